# _violation.pxi - how a forbidden access becomes an exception of the Python thread that made it.
#
# Lives here: what the core's handler asks of the interpreter (ps_hooks), the class that is raised, the wrapped slots
# that make it exact, and Guard.  Not here: when an access is forbidden, and what becomes of it (ext/fault.c).
#
# The handler leaves a description with the thread (ps_violation) and an asynchronous exception, whose class takes the
# description when it is constructed.  The interpreter raises such an exception after the call that made the access. An
# item assignment or an operator is no call: so the slots of memoryview and ndarray look themselves, when they are done.
# Invariants
#  1. The hooks run in a signal handler, at an instruction that may be anywhere in C code: no Python code runs there.
#  2. No Python code sees the exception before the thread has left quarantine: constructing it does that first.

cdef extern from *:
    """
    #include <signal.h>
    #include <unistd.h>

    #if PY_VERSION_HEX >= 0x030D0000
    #define holder_of_gil PyThreadState_GetUnchecked
    #else
    #define holder_of_gil _PyThreadState_UncheckedGet
    #endif

    /* For good, from the first region on that wants them. */
    static PyObject *violation_class, *withdrawn_class, *python_function;
    static int (*raise_violation)(void);

    /* -- Hooks -- */

    static bool hook_can_raise(void) {
        return PyGILState_GetThisThreadState() != NULL;
    }

    static void *hook_release(void) {
        PyThreadState *mine = PyGILState_GetThisThreadState();
        return mine && mine == holder_of_gil() ? PyEval_SaveThread() : NULL;
    }

    /* A thread that asks for the interpreter while that ends would be ended in the middle of C code. */
    static void hook_regain(void *token) {
        if (!token)
            return;
        while (Py_IsFinalizing())
            pause();
        PyEval_RestoreThread(token);
    }

    /* Ctrl-C is the main thread's matter; it is asked with the interpreter in hand. */
    static bool hook_interrupted(void *token) {
        PyThreadState *mine = PyGILState_GetThisThreadState();
        if (!mine || gettid() != getpid() || Py_IsFinalizing())
            return false;
        (void)token;
        PyEval_RestoreThread(mine);
        bool interrupted = PyOS_InterruptOccurred();
        PyEval_SaveThread();
        return interrupted;
    }

    /* The interpreter is ours, and an exception may be under way in it. */
    static void describe_place(struct ps_violation *violation, PyThreadState *mine) {
        PyFrameObject *frame = PyThreadState_GetFrame(mine);
        violation->code = violation->other = NULL;
        violation->line = 0;
        if (frame) {
            violation->code = PyFrame_GetCode(frame);
            violation->line = PyFrame_GetLineNumber(frame);
            Py_DECREF(frame);
        }
    }

    static void hook_tell(struct ps_violation *violation) {
        PyThreadState *mine = PyGILState_GetThisThreadState();
        bool held = mine == holder_of_gil();
        if (!held)
            hook_regain(mine);
        describe_place(violation, mine);
        violation->other = mine->async_exc; /* somebody else's comes after ours */
        Py_XINCREF((PyObject *)violation->other);
        PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), violation_class);
        if (!held)
            PyEval_SaveThread();
    }

    static const struct ps_hooks hooks = {hook_can_raise, hook_tell, hook_release, hook_regain, hook_interrupted};

    static void install_hooks(PyObject *cls, PyObject *withdrawn, PyObject *function, int (*raise)(void)) {
        violation_class = cls;
        withdrawn_class = withdrawn;
        python_function = function;
        raise_violation = raise;
        ps_set_hooks(&hooks);
    }

    /* Whatever calls Python code from now on may be told of it. */
    static void hand_over_exception(PyObject *other) {
        if (other)
            PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), other);
        Py_XDECREF(other);
    }

    /* It is raised by other means.  An asynchronous exception that is taken back leaves the interpreter of Python 3.11
     * and 3.12 looking for it for ever, and a function that is traced never gets beyond its first instruction.  So
     * another one takes its place, and is raised in a function that does nothing, at the recursion limit too; what
     * signal handlers raise there instead comes later.  Where there is no memory for the call it is taken back. */
    static void withdraw_exception(void) {
        PyThreadState *mine = PyThreadState_Get();
        PyObject *other = NULL;
        if (mine->async_exc != violation_class)
            return;
        PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), withdrawn_class);
        mine->recursion_headroom++; /* as the interpreter does where it makes a RecursionError */
        for (int calls = 0; calls < 8 && mine->async_exc == withdrawn_class; calls++) {
            PyObject *result = PyObject_CallNoArgs(python_function);
            if (!result && !PyErr_ExceptionMatches(withdrawn_class))
                Py_XSETREF(other, Py_NewRef(PyErr_Occurred()));
            Py_XDECREF(result);
            PyErr_Clear();
        }
        mine->recursion_headroom--;
        if (mine->async_exc == withdrawn_class)
            PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), NULL);
        hand_over_exception(other);
    }

    /* -- Slots: of memoryview and of ndarray, and of subtypes that have them by inheritance -- */

    #define VIOLATED (__builtin_expect(ps_violation()->count != 0, 0))

    static int violated_status(void) {
        PyErr_Clear();
        return raise_violation();
    }

    static PyObject *violated_object(PyObject *result) {
        Py_XDECREF(result);
        PyErr_Clear();
        raise_violation();
        return NULL;
    }

    struct originals {
        PyTypeObject *type;
    #define KEEP(group, slot, type) type slot;
    #define UNARY(slot) KEEP(number, slot, unaryfunc)
    #define BINARY(slot) KEEP(number, slot, binaryfunc)
    #define ALL_SLOTS                                                                                                  \\
        KEEP(mapping, mp_ass_subscript, objobjargproc) KEEP(mapping, mp_subscript, binaryfunc)                         \\
        KEEP(sequence, sq_ass_item, ssizeobjargproc) KEEP(sequence, sq_item, ssizeargfunc)                             \\
        KEEP(sequence, sq_contains, objobjproc) KEEP(number, nb_bool, inquiry)                                         \\
        KEEP(number, nb_power, ternaryfunc) KEEP(number, nb_inplace_power, ternaryfunc)                                \\
        UNARY(nb_negative) UNARY(nb_positive) UNARY(nb_absolute) UNARY(nb_invert)                                      \\
        BINARY(nb_add) BINARY(nb_subtract) BINARY(nb_multiply) BINARY(nb_remainder) BINARY(nb_divmod)                  \\
        BINARY(nb_lshift) BINARY(nb_rshift) BINARY(nb_and) BINARY(nb_xor) BINARY(nb_or) BINARY(nb_floor_divide)        \\
        BINARY(nb_true_divide) BINARY(nb_matrix_multiply) BINARY(nb_inplace_add) BINARY(nb_inplace_subtract)           \\
        BINARY(nb_inplace_multiply) BINARY(nb_inplace_remainder) BINARY(nb_inplace_lshift)                             \\
        BINARY(nb_inplace_rshift) BINARY(nb_inplace_and) BINARY(nb_inplace_xor) BINARY(nb_inplace_or)                  \\
        BINARY(nb_inplace_floor_divide) BINARY(nb_inplace_true_divide) BINARY(nb_inplace_matrix_multiply)
        ALL_SLOTS
        richcmpfunc tp_richcompare;
    #undef KEEP
    };
    static struct originals of_views, of_arrays;

    /* One set of wrappers for each of the two types: what they call must not depend on the object. */
    #define WRAP_objobjargproc(of, slot)                                                                               \\
        static int of##slot(PyObject *a, PyObject *b, PyObject *c) {                                                   \\
            int result = of.slot(a, b, c);                                                                             \\
            return VIOLATED ? violated_status() : result;                                                              \\
        }
    #define WRAP_ssizeobjargproc(of, slot)                                                                             \\
        static int of##slot(PyObject *a, Py_ssize_t i, PyObject *b) {                                                  \\
            int result = of.slot(a, i, b);                                                                             \\
            return VIOLATED ? violated_status() : result;                                                              \\
        }
    #define WRAP_objobjproc(of, slot)                                                                                  \\
        static int of##slot(PyObject *a, PyObject *b) {                                                                \\
            int result = of.slot(a, b);                                                                                \\
            return VIOLATED ? violated_status() : result;                                                              \\
        }
    #define WRAP_inquiry(of, slot)                                                                                     \\
        static int of##slot(PyObject *a) {                                                                             \\
            int result = of.slot(a);                                                                                   \\
            return VIOLATED ? violated_status() : result;                                                              \\
        }
    #define WRAP_unaryfunc(of, slot)                                                                                   \\
        static PyObject *of##slot(PyObject *a) {                                                                       \\
            PyObject *result = of.slot(a);                                                                             \\
            return VIOLATED ? violated_object(result) : result;                                                        \\
        }
    #define WRAP_binaryfunc(of, slot)                                                                                  \\
        static PyObject *of##slot(PyObject *a, PyObject *b) {                                                          \\
            PyObject *result = of.slot(a, b);                                                                          \\
            return VIOLATED ? violated_object(result) : result;                                                        \\
        }
    #define WRAP_ternaryfunc(of, slot)                                                                                 \\
        static PyObject *of##slot(PyObject *a, PyObject *b, PyObject *c) {                                             \\
            PyObject *result = of.slot(a, b, c);                                                                       \\
            return VIOLATED ? violated_object(result) : result;                                                        \\
        }
    #define WRAP_ssizeargfunc(of, slot)                                                                                \\
        static PyObject *of##slot(PyObject *a, Py_ssize_t i) {                                                         \\
            PyObject *result = of.slot(a, i);                                                                          \\
            return VIOLATED ? violated_object(result) : result;                                                        \\
        }
    #define WRAP_richcmpfunc(of, slot)                                                                                 \\
        static PyObject *of##slot(PyObject *a, PyObject *b, int op) {                                                  \\
            PyObject *result = of.slot(a, b, op);                                                                      \\
            return VIOLATED ? violated_object(result) : result;                                                        \\
        }
    #define KEEP(group, slot, type) WRAP_##type(of_views, slot)
    ALL_SLOTS
    WRAP_richcmpfunc(of_views, tp_richcompare)
    #undef KEEP
    #define KEEP(group, slot, type) WRAP_##type(of_arrays, slot)
    ALL_SLOTS
    WRAP_richcmpfunc(of_arrays, tp_richcompare)
    #undef KEEP

    static void keep_slots(struct originals *of, PyTypeObject *type) {
        of->type = type;
        of->tp_richcompare = type->tp_richcompare;
    #define KEEP(group, slot, kind) of->slot = type->tp_as_##group ? type->tp_as_##group->slot : NULL;
        ALL_SLOTS
    #undef KEEP
    }

    #define REPLACE(place, of, slot)                                                                                   \\
        if (of.slot && place == of.slot)                                                                               \\
            place = of##slot;

    static void wrap_views(PyTypeObject *type) {
        REPLACE(type->tp_richcompare, of_views, tp_richcompare)
    #define KEEP(group, slot, kind)                                                                                    \\
        if (type->tp_as_##group)                                                                                       \\
            REPLACE(type->tp_as_##group->slot, of_views, slot)
        ALL_SLOTS
    #undef KEEP
    }

    static void wrap_arrays(PyTypeObject *type) {
        REPLACE(type->tp_richcompare, of_arrays, tp_richcompare)
    #define KEEP(group, slot, kind)                                                                                    \\
        if (type->tp_as_##group)                                                                                       \\
            REPLACE(type->tp_as_##group->slot, of_arrays, slot)
        ALL_SLOTS
    #undef KEEP
    }

    /* Subtypes that are made later take their slots from what the type's dictionary wraps. */
    static void wrap_descriptors(PyTypeObject *type) {
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(type->tp_dict, &at, &key, &value);) {
            if (!Py_IS_TYPE(value, &PyWrapperDescr_Type))
                continue;
            void **wrapped = &((PyWrapperDescrObject *)value)->d_wrapped;
            if (*wrapped == (void *)of_arrays.tp_richcompare)
                *wrapped = (void *)of_arraystp_richcompare;
    #define KEEP(group, slot, kind)                                                                                    \
        else if (of_arrays.slot && *wrapped == (void *)of_arrays.slot) *wrapped = (void *)of_arrays##slot;
            ALL_SLOTS
    #undef KEEP
        }
    }

    static void hold_views(void) {
        keep_slots(&of_views, &PyMemoryView_Type);
        wrap_views(&PyMemoryView_Type);
    }

    static bool arrays_are_wrapped(void) {
        return of_arrays.type != NULL;
    }

    static void keep_arrays(PyTypeObject *type) {
        keep_slots(&of_arrays, type);
        wrap_descriptors(type);
    }
    """
    ctypedef int (*raiser)() except -1
    void install_hooks(PyObject *cls, PyObject *withdrawn, PyObject *function, raiser raise_it)
    void withdraw_exception()
    void hand_over_exception(PyObject *other)
    ps_violation_t *violation_of_thread "ps_violation"() nogil
    void hold_views()
    bint arrays_are_wrapped()
    void keep_arrays(PyTypeObject *type)
    void wrap_arrays(PyTypeObject *type)

from cpython.exc cimport PyErr_SetInterrupt


class Violation(_errors.ProtectionError):
    """What a thread is told of its forbidden access; made without arguments, by the interpreter too."""

    def __init__(self):
        cdef ps_violation_t pending = violation_of_thread()[0]
        if not pending.count:
            super().__init__("a forbidden access, of which no more is known")
            return
        forget_violation()
        code = None if pending.code is NULL else <object>pending.code
        Py_XDECREF(pending.code)
        self._fill(
            "store" if pending.required & 2 else "load", pending.region.decode() or None, pending.offset,
            pending.page_size, pending.required, pending.actual, pending.author.generation if pending.author.known else None,
            pending.author.pid if pending.author.known else None, getattr(code, "co_filename", None),
            pending.line or None)
        hand_over_exception(pending.other)
        if pending.interrupted:
            PyErr_SetInterrupt()
            PyErr_CheckSignals()  # the signal's own exception, as a rule; else it was waiting in vain

    def __reduce__(self):
        return _errors._restore, (_errors.ProtectionError, self.args, dict(self.__dict__))


class _Withdrawn(BaseException):
    """Seen by nobody."""


Violation.__name__ = Violation.__qualname__ = "ProtectionError"
Violation.__module__ = "pyshare"


cdef forget_violation():
    """The thread sees shared data again, and nothing is due to it any more."""
    cdef ps_violation_t *pending = violation_of_thread()
    with nogil:
        ps_quarantine_leave()
    pending.count = 0
    pending.interrupted = False
    pending.code = pending.other = NULL
    withdraw_exception()


cdef int raise_pending() except -1:
    raise Violation()


cdef bint raising = False  # some region of this process has had a policy that raises


cdef expect_violations():
    """From now on forbidden accesses may raise in this process."""
    global raising
    if not raising:
        raising = True
        function = eval("lambda: None", {})  # no function of this module, where the interpreter looks for nothing
        for kept in (Violation, _Withdrawn, function):
            Py_INCREF(kept)
        hold_views()
        install_hooks(<PyObject *>Violation, <PyObject *>_Withdrawn, <PyObject *>function, raise_pending)
    wrap_numpy()


cdef wrap_numpy():
    """Where numpy is loaded: the slots of its arrays, also in the types that have inherited them."""
    if not raising or arrays_are_wrapped():
        return
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    if not isinstance(ndarray, type):
        return
    keep_arrays(<PyTypeObject *>ndarray)
    types = [ndarray]
    for cls in types:
        wrap_arrays(<PyTypeObject *>cls)
        types.extend(type.__subclasses__(cls))


@cython.final
cdef class Guard:
    """A block at whose end this thread is told of its forbidden accesses, whatever made them; from Region.guard().

    Exact for all code, where an item assignment by ctypes, say, is told of a few instructions later. For regions whose
    policy here is "raise", or "wait" where the wait was interrupted. May be used again.
    """

    def __init__(self):
        raise TypeError("make a guard with region.guard()")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if violation_of_thread().count:
            raise Violation()
