"""dlpack.pxi: part of _core.pyx: memory as tensor libraries take it from each other (DLPack 1.0, dlpack.h).

Lives here: the structs of that protocol, and capsules of one-dimensional tensors of bytes over a buffer.
Invariant: a tensor has a buffer of its own until its deleter has run, in whatever thread: so close() knows of it.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int32_t, uint16_t

cdef extern from "Python.h":
    object new_capsule "PyCapsule_New"(void *pointer, const char *name, void (*destructor)(PyObject *) noexcept)
    bint PyCapsule_IsValid(PyObject *capsule, const char *name)
    void *PyCapsule_GetPointer(PyObject *capsule, const char *name)
    bint Py_IsInitialized() nogil

cdef enum:
    ON_CPU = 1       # kDLCPU
    UNSIGNED = 1     # kDLUInt
    IS_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
    IS_COPIED = 2    # DLPACK_FLAG_BITMASK_IS_COPIED

cdef struct Tensor:  # DLTensor, with its DLDevice and DLDataType
    void *data
    int32_t device_type
    int32_t device_id
    int32_t dimensions
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t *shape
    int64_t *strides  # in elements
    uint64_t byte_offset

cdef struct Plain:  # DLManagedTensor
    Tensor tensor
    void *context
    void (*deleter)(Plain *self) noexcept nogil

cdef struct Versioned:  # DLManagedTensorVersioned
    uint32_t major
    uint32_t minor
    void *context
    void (*deleter)(Versioned *self) noexcept nogil
    uint64_t flags
    Tensor tensor

cdef struct Lent:  # what goes out: one of the two, and what it points at
    Py_buffer buffer
    int64_t length
    int64_t stride
    Plain plain
    Versioned versioned


cdef void take_back(Lent *lent) noexcept nogil:
    if not Py_IsInitialized() or Py_IsFinalizing():
        return  # the process ends; nobody is there to be told
    with gil:
        PyBuffer_Release(&lent.buffer)
        PyMem_Free(lent)


cdef void delete_plain(Plain *self) noexcept nogil:
    take_back(<Lent *>self.context)


cdef void delete_versioned(Versioned *self) noexcept nogil:
    take_back(<Lent *>self.context)


cdef void destroy_plain(PyObject *capsule) noexcept:
    """Of a capsule that nobody has taken the tensor of; who takes one gives the capsule another name."""
    if PyCapsule_IsValid(capsule, "dltensor"):
        delete_plain(<Plain *>PyCapsule_GetPointer(capsule, "dltensor"))


cdef void destroy_versioned(PyObject *capsule) noexcept:
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        delete_versioned(<Versioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned"))


cdef object tensor_of(source, bint versioned, uint64_t flags):
    """A capsule, from a buffer; BufferError where its reader could not know that it is read-only."""
    cdef Lent *lent = <Lent *>PyMem_Malloc(sizeof(Lent))
    if lent is NULL:
        raise MemoryError
    try:
        PyObject_GetBuffer(source, &lent.buffer, PyBUF_SIMPLE)
    except BaseException:
        PyMem_Free(lent)
        raise
    try:
        if lent.buffer.readonly and not versioned:
            raise BufferError(
                "__dlpack__: this memory is read-only, which only DLPack 1.0 or later can say (max_version); copy it, or "
                "use a library that asks for that")
        lent.length, lent.stride = lent.buffer.len, 1
        lent.plain.tensor = Tensor(lent.buffer.buf, ON_CPU, 0, 1, UNSIGNED, 8, 1, &lent.length, &lent.stride, 0)
        lent.plain.context, lent.plain.deleter = lent, delete_plain
        if not versioned:
            return new_capsule(&lent.plain, "dltensor", destroy_plain)
        lent.versioned = Versioned(1, 0, lent, delete_versioned, flags, lent.plain.tensor)
        if lent.buffer.readonly:
            lent.versioned.flags |= IS_READ_ONLY
        return new_capsule(&lent.versioned, "dltensor_versioned", destroy_versioned)
    except BaseException:
        take_back(lent)
        raise
