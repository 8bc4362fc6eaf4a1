/* exception.c - how a forbidden access becomes an exception of the Python thread that made it.
 *
 * Lives here: what the core's handler asks of the interpreter (ps_hooks), and
 * how a thread is told.  Not here: the slots that tell (wrappers.c); the exception
 * (violation.pxi); when an access is forbidden, and what becomes of it
 * (fault/).
 * Who tells is decided at the access.  Of an access of a wrapped slot it is the
 * slot, when it returns.  Of any other it is the interpreter, where it next
 * looks for what is due to the thread: as a rule after the call that made the
 * access.  It does so by a pending call, which can see whether it is in the right
 * place, and after the handlers of signals.  Where a thread has none (before Python 3.12 all
 * but the main one), or its call may come too late, by an asynchronous exception.
 * Invariants
 *  1. The hooks run in a signal handler, at an instruction that may be anywhere
 *     in C code: no Python code runs there, no object is made; but in `serve`,
 *     which is called where other threads could run as well.
 *  2. No Python code sees the exception before the thread has left quarantine.
 *  3. What is due is told once, or found out not to be due any more (is_due).
 * Runs in: signal handler (hook_*); any thread, with the interpreter.
 */
#define _GNU_SOURCE
#include "binding/binding.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#include "os/os.h"

#ifndef Py_BUILD_CORE
#define Py_BUILD_CORE
#endif
#undef _PyGC_FINALIZED /* 3.12's headers contradict each other */
#if PY_VERSION_HEX >= 0x030E0000
#include <internal/pycore_ceval.h>
#include <internal/pycore_interpframe_structs.h>
#include <internal/pycore_runtime.h>
#elif PY_VERSION_HEX >= 0x030D0000
#include <internal/pycore_ceval.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_runtime.h>
#else
#include <internal/pycore_ceval.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_interp.h>
#include <internal/pycore_runtime.h>
#include <opcode.h>
#endif

#define PATIENCE (1000 * PS_MS) /* how long the interpreter waits for the frame of an access to go on */
#define ABSENCE (100 * PS_MS)   /* ... and how long a thread that has given it up may work without it */

_Thread_local struct ps_due ps_due;

static PyObject *violation_class, *python_function; /* for good, from the first region on that wants them */

/* -- What the interpreter keeps to itself ------------------------------------------------------------------------- */

typedef struct _PyInterpreterFrame frame_t;

/* The one that C code entered the interpreter with, or its mark. */
static bool is_entry(const frame_t *frame) {
#if PY_VERSION_HEX >= 0x030E0000
    return frame->owner == FRAME_OWNED_BY_INTERPRETER;
#elif PY_VERSION_HEX >= 0x030C0000
    return frame->owner == FRAME_OWNED_BY_CSTACK;
#else
    return frame->is_entry;
#endif
}

/* A frame object would be a new one, and could start the garbage collector. */
static PyObject *code_of(frame_t *frame) {
#if PY_VERSION_HEX >= 0x030C0000
    return PyUnstable_InterpreterFrame_GetCode(frame);
#else
    return Py_NewRef((PyObject *)frame->f_code);
#endif
}

static int instruction_of(frame_t *frame) {
#if PY_VERSION_HEX >= 0x030C0000
    return PyUnstable_InterpreterFrame_GetLasti(frame);
#else
    return _PyInterpreterFrame_LASTI(frame) * (int)sizeof(_Py_CODEUNIT);
#endif
}

static bool has_signals(const PyThreadState *state) {
#if PY_VERSION_HEX >= 0x030D0000
    return state->eval_breaker & _PY_SIGNALS_PENDING_BIT;
#else
    (void)state;
    return _Py_atomic_load_relaxed(&_PyRuntime.ceval.signals_pending);
#endif
}

/* Python has been told of signals, whose handlers it calls before it looks at anything else that is due.  Without: it
 * finds the handlers to call when it is told again. */
static void set_signals(PyThreadState *mine, bool pending) {
#if PY_VERSION_HEX >= 0x030D0000
    if (pending)
        _Py_set_eval_breaker_bit(mine, _PY_SIGNALS_PENDING_BIT);
    else
        _Py_unset_eval_breaker_bit(mine, _PY_SIGNALS_PENDING_BIT);
#else
    _Py_atomic_store_relaxed(&_PyRuntime.ceval.signals_pending, pending);
    if (pending)
        _Py_atomic_store_relaxed(&mine->interp->ceval.eval_breaker, 1);
#endif
}

static void show_signals(PyThreadState *mine) {
    if (ps_due.hides_signals)
        set_signals(mine, true);
    ps_due.hides_signals = false;
}

/* The calling thread's own. */
static void set_async_exc(PyThreadState *mine, PyObject *exception) {
#if PY_VERSION_HEX >= 0x030C0000
    PyThreadState_SetAsyncExc(mine->thread_id, exception);
#else
    /* That function would give it to a thread that this one is creating, which has its number until it runs. */
    PyObject *before = mine->async_exc;
    mine->async_exc = Py_NewRef(exception);
    Py_XDECREF(before);
    mine->interp->ceval.pending.async_exc = 1;
    _Py_atomic_store_relaxed(&mine->interp->ceval.eval_breaker, 1);
#endif
}

static bool is_wanted(const PyThreadState *state) {
#if PY_VERSION_HEX >= 0x030D0000
    return state->eval_breaker & _PY_GIL_DROP_REQUEST_BIT;
#else
    return _Py_atomic_load_relaxed(&state->interp->ceval.gil_drop_request);
#endif
}

/* -- Errors ------------------------------------------------------------------------------------------------------- */

static PyObject *take_error(void) {
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace)
        PyException_SetTraceback(value, trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return value;
#endif
}

/* Without what is being handled as its context. */
static void put_error(PyObject *error) {
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(error);
#else
    PyErr_Restore(Py_XNewRef(error ? (PyObject *)Py_TYPE(error) : NULL), error,
                  error ? PyException_GetTraceback(error) : NULL);
#endif
}

void ps_chain(PyObject *error, PyObject *context) {
    PyObject *last = Py_NewRef(error), *next;
    while (last != context && (next = PyException_GetContext(last)))
        Py_SETREF(last, next);
    if (last == context)
        Py_DECREF(context);
    else
        PyException_SetContext(last, context);
    Py_DECREF(last);
}

/* -- Being told --------------------------------------------------------------------------------------------------- */

/* A thread whose tell_now is among the pending calls, which other threads may come across. */
struct ps_asked {
    uint64_t thread; /* as the interpreter counts them; 0: a free place */
    bool due;
    struct ps_due *of; /* the thread's */
    int64_t since;     /* ps_sys_now */
    clockid_t clock;   /* of the thread's CPU time: */
    int64_t worked;    /* ns, when it asked */
};
static struct ps_asked asked[64];

/* Who is being told by tell_now, in which other threads may have the interpreter, and handlers of signals run.  Python
 * calls one pending call at a time, so none comes there; and it does not forget at a fork that one is under way, so in
 * a child that another thread forks just then none ever comes. */
static struct {
    uint64_t thread; /* 0: nobody */
    pid_t process;
} teller;

static PyThreadState *state_of(uint64_t thread) {
    PyThreadState *state = PyInterpreterState_ThreadHead(PyThreadState_Get()->interp);
    while (state && PyThreadState_GetID(state) != thread)
        state = PyThreadState_Next(state);
    return state;
}

/* A thread that cannot be left its pending call: its exception may come anywhere in its Python code, and somebody
 * else's that is there already comes afterwards. */
static void ask_other(const struct ps_asked *place) {
    PyThreadState *other = state_of(place->thread);
    if (!other || other->async_exc == violation_class)
        return;
    if (other->async_exc)
        Py_XSETREF(place->of->other, Py_NewRef(other->async_exc));
    PyThreadState_SetAsyncExc(other->thread_id, violation_class);
}

/* Before others have the interpreter in the midst of tell_now: the pending calls of those who have asked come too late
 * for them.  They come nevertheless, should somebody else's asynchronous exception take the place of ours. */
static void ask_others(PyThreadState *mine) {
    if (teller.thread != PyThreadState_GetID(mine))
        return;
    for (struct ps_asked *place = asked; place < asked + sizeof asked / sizeof *asked; place++)
        if (place->thread && place->thread != teller.thread && place->due)
            ask_other(place);
}

static bool never_comes(PyThreadState *mine) {
    return teller.thread && teller.thread != PyThreadState_GetID(mine) && teller.process != getpid();
}

static bool has_asked(PyThreadState *mine) {
    return ps_due.asked && ps_due.asked->thread == PyThreadState_GetID(mine) && ps_due.asked->due;
}

static bool is_asked(PyThreadState *mine) {
    return has_asked(mine) && !never_comes(mine);
}

static void ask_no_more(PyThreadState *mine) {
    if (has_asked(mine))
        ps_due.asked->due = false;
    ps_due.asked = NULL;
}

static void note_place(PyThreadState *mine) {
    frame_t *frame = (frame_t *)ps_frame_of(mine);
    Py_XDECREF(ps_due.code);
    ps_due.frame = frame;
    ps_due.code = frame ? code_of(frame) : NULL;
    ps_due.at = frame ? instruction_of(frame) : 0;
    ps_due.line = frame ? PyCode_Addr2Line((PyCodeObject *)ps_due.code, ps_due.at) : 0;
}

void ps_forget(void) {
    struct ps_violation *violation = ps_violation();
    PyObject *other = ps_due.other;
    PyThreadState *mine = PyThreadState_Get();
    ask_no_more(mine);
    if (ps_quarantine_leave(ps_sys_now() + PS_MS)) { /* as a rule nobody has the pages for longer */
        ask_others(mine);
        PyEval_SaveThread();
        ps_quarantine_leave(PS_NEVER);
        PyEval_RestoreThread(mine);
    }
    violation->count = 0;
    violation->interrupted = false;
    ps_due.by = 0;
    ps_due.other = NULL;
    Py_CLEAR(ps_due.code);
    if (other)
        set_async_exc(mine, other);
    Py_XDECREF(other);
}

PyObject *ps_told(void) {
    PyObject *told = ps_due.raised;
    ask_no_more(PyThreadState_Get()); /* before other threads have the interpreter */
    ps_due.raised = NULL;
    if (!told && ps_violation()->interrupted) {
        ask_others(PyThreadState_Get());
        told = PyErr_CheckSignals() ? take_error() : NULL;
    }
    if (ps_due.by != PS_LATER)
        note_place(PyThreadState_Get());
    if (!told)
        told = PyObject_CallNoArgs(violation_class);
    else
        ps_forget();
    if (!told) { /* there is no memory for it */
        ps_forget();
        told = take_error();
    }
    show_signals(PyThreadState_Get());
    return told;
}

void ps_tell(void) {
    PyObject *own = take_error(), *told = ps_told();
    if (!own) {
        PyErr_SetObject((PyObject *)Py_TYPE(told), told);
        Py_DECREF(told);
    } else if (PyErr_GivenExceptionMatches(own, PyExc_Exception)) {
        ps_chain(told, own);
        put_error(told);
    } else {
        ps_chain(own, told);
        put_error(own);
    }
}

/* An asynchronous exception cannot be taken back, but it comes where a function begins. */
static PyObject *let_it_come(void) {
    PyThreadState *mine = PyThreadState_Get();
    PyThreadState_EnterTracing(mine); /* a profiler would see the function's end and not its beginning */
    PyObject *result = PyObject_CallNoArgs(python_function);
    PyThreadState_LeaveTracing(mine);
    if (!result)
        return take_error();
    Py_DECREF(result);
    return NULL;
}

PyObject *ps_take(void) {
    if (!ps_due.by)
        return NULL;
    return PyThreadState_Get()->async_exc == violation_class ? let_it_come() : ps_told();
}

/* -- By the interpreter ---------------------------------------------------------------------------------------------
 */

/* Where the interpreter is, as seen from the access. */
enum where {
    THERE,  /* at the instruction that made it */
    INSIDE, /* in Python code that C code has called meanwhile: a signal's handler, a finaliser, a callback */
    PAST,   /* the frame has gone on, or has gone */
};

static enum where where_from_access(const PyThreadState *mine) {
    frame_t *frame = (frame_t *)ps_frame_of(mine);
    if (frame && frame == ps_due.frame && instruction_of(frame) == ps_due.at)
        return THERE;
    bool inside = false;
    for (; frame; frame = frame->previous) {
        if (frame == ps_due.frame)
            return inside ? INSIDE : PAST;
        inside |= is_entry(frame);
    }
    return PAST;
}

static int tell_now(void *place);

/* The calling thread is the one that Py_AddPendingCall tells of what is pending.  Python 3.13 goes on to tell the one
 * that was the parent's, in a child that another thread has forked: its memory is freed. */
static bool is_main(const PyThreadState *mine) {
#if PY_VERSION_HEX >= 0x030D0000
    return mine == _PyRuntime.main_tstate;
#else
    (void)mine;
    return gettid() == getpid();
#endif
}

/* In Python 3.11 only the main thread has pending calls. */
static int add_pending_call(PyThreadState *mine, struct ps_asked *place) {
    if (is_main(mine) && place->thread == PyThreadState_GetID(mine))
        return Py_AddPendingCall(tell_now, place);
#if PY_VERSION_HEX >= 0x030C0000
    return (int)_PyEval_AddPendingCall(mine->interp, tell_now, place, 0);
#else
    (void)mine;
    return -1;
#endif
}

static int64_t cpu_time(clockid_t clock) {
    struct timespec time = {0};
    clock_gettime(clock, &time); /* it fails where the thread has ended */
    return time.tv_sec * 1000 * PS_MS + time.tv_nsec;
}

static bool queue(PyThreadState *mine) {
    struct ps_asked *place = asked, *end = asked + sizeof asked / sizeof *asked;
    while (place < end && place->thread)
        place++;
    if (place == end || never_comes(mine))
        return false;
    *place = (struct ps_asked){.thread = PyThreadState_GetID(mine), .due = true, .of = &ps_due, .since = ps_sys_now()};
    pthread_getcpuclockid(pthread_self(), &place->clock);
    place->worked = cpu_time(place->clock);
    ps_due.asked = place;
    if (!add_pending_call(mine, place))
        return true;
    place->thread = 0;
    return false;
}

#if PY_VERSION_HEX < 0x030C0000
static int trace_and_queue(PyObject *self, PyFrameObject *frame, int what, PyObject *argument) {
    PyThreadState *mine = PyThreadState_Get();
    *(mine->c_tracefunc == trace_and_queue ? &mine->c_tracefunc : &mine->c_profilefunc) = ps_due.tracer;
    Py_tracefunc tracer = ps_due.tracer;
    ps_due.tracer = NULL;
    if (ps_due.by == PS_LATER)
        queue(mine);
    return tracer(self, frame, what, argument);
}

/* Python 3.11 asks for what is due before it tells a tracer that a function begins, and would do so for ever.  So it is
 * to ask again when the tracer has its turn. */
static bool queue_after_tracer(PyThreadState *mine) {
    int opcode = _Py_OPCODE(*((frame_t *)ps_frame_of(mine))->prev_instr);
    Py_tracefunc *tracer = mine->c_tracefunc ? &mine->c_tracefunc : &mine->c_profilefunc;
    if (!mine->cframe->use_tracing || !*tracer || (opcode != RESUME && opcode != RESUME_QUICK))
        return false;
    ps_due.tracer = *tracer;
    *tracer = trace_and_queue;
    return true;
}
#else
#define queue_after_tracer(mine) false
#endif

/* The exception of an access of the calling thread's is raised: -1; or nobody would get it. */
static int raise_here(PyThreadState *mine, enum where where) {
    PyObject *handled = where == PAST ? PyErr_GetHandledException() : NULL;
    bool is_new = handled && handled != ps_due.handled; /* since the access: Ctrl-C, say, which is not to be hidden */
    PyObject *told = ps_told();
    if (is_new)
        ps_chain(handled, Py_NewRef(told));
    else
        PyErr_SetObject((PyObject *)Py_TYPE(told), told);
    Py_DECREF(told);
    Py_XDECREF(handled);
    if (!is_new && !ps_frame_of(mine)) { /* nobody would get it */
        ask_others(mine);
        PyErr_WriteUnraisable(NULL);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* A thread that works without the interpreter may do so for long.  One that does not was kept from the interpreter: it
 * waits for it, or for a CPU; or it sleeps in a system call. */
static bool is_away(const struct ps_asked *place) {
    int64_t waited = ps_sys_now() - place->since;
    return waited > PATIENCE || (waited > ABSENCE && cpu_time(place->clock) - place->worked > ABSENCE);
}

/* A pending call that is not to tell, as it stands, is there again: one that another thread is to come across, which
 * alone knows whether it is in the right place; or that of a thread whose asynchronous exception comes in a moment, in
 * whose place somebody else's might have come.  It is not put back for a thread that is away: Python would do little
 * else until that comes back. */
static bool put_back(PyThreadState *mine, struct ps_asked *place) {
    if (place->thread == PyThreadState_GetID(mine))
        return mine->async_exc == violation_class && !add_pending_call(mine, place);
    if (state_of(place->thread) && !is_away(place) && !add_pending_call(mine, place))
        return true;
    ask_other(place);
    return false;
}

/* A pending call. */
static int tell_now(void *place) {
    PyThreadState *mine = PyThreadState_Get();
    struct ps_asked who = *(struct ps_asked *)place;
    if (who.due && put_back(mine, place))
        return 0;
    ((struct ps_asked *)place)->thread = 0;
    if (!who.due || who.thread != PyThreadState_GetID(mine) || mine->async_exc == violation_class)
        return 0;
    enum where where = where_from_access(mine);
    /* In Python code that has nothing to do with the access the exception would end that, or get lost there; and so
     * would one that a tracer is being told of. */
    if ((where == INSIDE || mine->tracing) && ps_sys_now() < ps_due.patience &&
        (queue_after_tracer(mine) || queue(mine)))
        return 0;
    int rc = 0;
    teller.process = getpid();
    teller.thread = who.thread;
    if (where == PAST && ps_violation()->interrupted) /* the signal's handler has raised in its place */
        ps_forget();
    else
        rc = raise_here(mine, where);
    teller.thread = 0;
    return rc;
}

static void ask_interpreter(PyThreadState *mine) {
    PyObject *handled = PyErr_GetHandledException();
    ps_due.handled = handled;
    Py_XDECREF(handled);
    ps_due.patience = ps_sys_now() + PATIENCE;
    /* An exception of a handler that came first would end the statement, and ours would come anywhere later. */
    ps_due.hides_signals = gettid() == getpid() && has_signals(mine) && !ps_violation()->interrupted;
    if (ps_due.hides_signals)
        set_signals(mine, false);
    if (queue(mine) && !teller.thread)
        return;
    show_signals(mine);
    if (mine->async_exc == violation_class)
        return;
    ps_due.other = Py_XNewRef(mine->async_exc);
    set_async_exc(mine, violation_class);
}

/* -- Hooks -------------------------------------------------------------------------------------------------------- */

static bool hook_can_raise(void) {
    return PyGILState_GetThisThreadState() != NULL;
}

static bool hook_is_due(void) {
    PyThreadState *mine = PyGILState_GetThisThreadState();
    if (ps_due.by != PS_LATER)
        return ps_due.by;
    return is_asked(mine) || ps_due.tracer || mine->async_exc == violation_class;
}

/* The C code that made the access is that of a wrapped slot; Python code that it has called has another frame. */
static bool in_wrapper(const PyThreadState *mine, uintptr_t flags) {
    return (ps_due.wrapper & flags) == flags &&
           (ps_due.wrapper & ~(PS_WRAPPER | PS_WRAPPER_YIELDS)) == (uintptr_t)ps_frame_of(mine);
}

static void *hook_release(void) {
    PyThreadState *mine = PyGILState_GetThisThreadState();
    return mine && mine == ps_thread_state() ? PyEval_SaveThread() : NULL;
}

/* A thread that asks for the interpreter while that ends would be ended in the middle of C code. */
static void hook_regain(void *token) {
    if (!token)
        return;
    while (Py_IsFinalizing())
        pause();
    PyEval_RestoreThread(token);
}

static void hook_tell(void) {
    PyThreadState *mine = PyGILState_GetThisThreadState();
    if (in_wrapper(mine, PS_WRAPPER)) {
        ps_due.by = ps_due.wrapper;
        return;
    }
    bool held = mine == ps_thread_state();
    if (!held)
        hook_regain(mine);
    note_place(mine);
    ps_due.by = PS_LATER;
    ask_interpreter(mine);
    if (!held)
        PyEval_SaveThread();
}

static bool hook_keeps(void) {
    PyThreadState *mine = PyGILState_GetThisThreadState();
    return mine && mine == ps_thread_state() && !ps_due.guards && !in_wrapper(mine, PS_WRAPPER | PS_WRAPPER_YIELDS);
}

static bool hook_is_wanted(void) {
    return is_wanted(PyGILState_GetThisThreadState());
}

/* Python runs them in the main thread. */
static bool hook_signalled(void) {
    PyThreadState *mine = PyGILState_GetThisThreadState();
    return mine && gettid() == getpid() && has_signals(mine);
}

static bool hook_serve(void) {
    hook_regain(PyGILState_GetThisThreadState());
    PyObject *before = take_error();
    struct ps_patience patience = *ps_process_patience(); /* the handler may wait, too */
    if (PyErr_CheckSignals())
        ps_due.raised = take_error();
    *ps_process_patience() = patience;
    put_error(before);
    PyEval_SaveThread();
    return !ps_due.raised;
}

void ps_expect_violations(PyObject *class, PyObject *function) {
    static const struct ps_hooks hooks = {hook_can_raise, hook_is_due,    hook_tell,      hook_release, hook_regain,
                                          hook_keeps,     hook_is_wanted, hook_signalled, hook_serve};
    violation_class = Py_NewRef(class);
    python_function = Py_NewRef(function);
    ps_set_hooks(&hooks);
}
