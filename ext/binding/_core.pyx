# cython: language_level=3, binding=True, embedsignature=True, embedsignature.format=python
# cython: auto_pickle=False, autotestdict=False
"""_core: the binding, an index of its parts.

Lives here: what the parts import.  Not here: protocol (ext/), checks of arguments that need no C (pyshare/_region.py).
Invariants
 1. Nothing of Python is held while the core waits; what the core did is over,
    and its lock released, before the GIL is taken again.
 2. Whoever uses the memory has a reference to the handle's Memory, and nobody
    else has: their number says whether it may be closed.
"""

cimport cython

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.object cimport PyObject, PyTypeObject, newfunc
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno as libc_errno
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from core cimport *

import enum
import errno
import operator
import os
import resource
import signal
import sys
import warnings

import _pyshare_faulthandler
from pyshare import _errors

include "violation.pxi"
include "dlpack.pxi"
include "arguments.pxi"
include "errors.pxi"
include "memory.pxi"
include "participant.pxi"
include "handle.pxi"
include "receive.pxi"
include "held.pxi"
include "interpreter.pxi"
include "snapshot.pxi"
include "dirty.pxi"
include "creation.pxi"
include "names.pxi"
include "observe.pxi"
include "async.pxi"
