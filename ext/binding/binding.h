/* binding.h - the C of the binding: how a forbidden access becomes an exception of the Python thread that made it.
 *
 * Lives here: what a thread is to be told, beside the core's ps_violation, and
 * what exception.c, wrappers.c and violation.pxi offer each other.
 */
#ifndef PS_BINDING_H
#define PS_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

#include "core.h"

/* Who tells a thread of its violation:
 *   0               nobody: nothing is due
 *   PS_LATER        the interpreter, when it next looks for what is due to the thread
 *   anything else   the wrapper of the slot that made the access, when it returns
 * A wrapper is the frame that called it, whose lowest bits are free, and PS_WRAPPER; with PS_WRAPPER_YIELDS other
 * threads may run in the midst of it. */
#define PS_LATER ((uintptr_t)2)
#define PS_WRAPPER ((uintptr_t)1)
#define PS_WRAPPER_YIELDS ((uintptr_t)4)

struct ps_due {
    uintptr_t wrapper;      /* the innermost that the thread is in; 0: none */
    uintptr_t by;           /* who tells */
    uint32_t guards;        /* that are open */
    bool hides_signals;     /* until it has been told by the interpreter, which else calls their handlers before */
    struct ps_asked *asked; /* PS_LATER, as a pending call; exception.c */
    int line, at;           /* where the program was, of code: its line, its instruction */
    const void *frame;      /* ... the frame, if the interpreter tells */
    PyObject *code;         /* ... NULL: nowhere */
    const void *handled;    /* ... and the exception that it was handling; to be compared only */
    int64_t patience;       /* tell_now comes back to the frame up to this time; ps_sys_now */
    PyObject *other;        /* somebody else's asynchronous exception, which comes afterwards */
    Py_tracefunc tracer;    /* whose place trace_and_queue has taken */
    PyObject *raised;       /* by a signal's handler during a wait: told in place of the violation */
};
extern _Thread_local struct ps_due ps_due;

#if PY_VERSION_HEX >= 0x030D0000
#define ps_thread_state PyThreadState_GetUnchecked
#else
#define ps_thread_state _PyThreadState_UncheckedGet
#define Py_IsFinalizing _Py_IsFinalizing
#endif

/* The Python frame that a thread is in, or that called the C code which it is in. */
static inline const void *ps_frame_of(const PyThreadState *state) {
#if PY_VERSION_HEX >= 0x030D0000
    return state->current_frame;
#else
    return state->cframe->current_frame;
#endif
}

/* exception.c.  With the interpreter.
 * ps_told: the exception that the thread is due, which is due no more; never NULL.
 * ps_tell: raises it.  What the code that is to raise has raised itself becomes its context; one that is to end the
 * thread or the program (no Exception) stays, with the violation as its context.
 * ps_take: as ps_told, wherever it was to come from; NULL: nothing is due. */
void ps_expect_violations(PyObject *violation_class, PyObject *python_function);
PyObject *ps_told(void);
void ps_tell(void);
PyObject *ps_take(void);
void ps_chain(PyObject *error, PyObject *context); /* at the end of error's contexts; the reference to it is stolen */
void ps_forget(void);                              /* the thread sees shared data again, and nothing is due to it */

/* wrappers.c: the slots of memoryview, of bytes and bytearray, and of numpy's types once that is loaded */
int ps_wrap_builtins(void);
int ps_wrap_numpy(PyObject *numpy);

#endif
