/* wrappers.c - slots of types that tell a thread of its violation as they return.
 *
 * An item assignment or an operator is no call, after which the interpreter
 * looks for what is due to the thread.  So the slots of the types whose C code
 * loads and stores look themselves.  Wrapped are memoryview and numpy's arrays,
 * their iterators and records, numpy's scalars, which hand over to arrays, and
 * the operators of bytes and bytearray that load from any buffer.
 * Invariants
 *  1. A slot tells of what it did itself: an access of Python code that it
 *     calls is told there, since that code has a frame of its own.
 *  2. ps_due.wrapper is what it was when the slot returns.
 * Each kind has wrappers of its own: what they call must not depend on the
 * object, which may be of a subtype.  A subtype has the wrapped slots where it
 * inherits them; one that is made later takes them from the descriptors.
 * Runs in: any thread, with the interpreter.
 */
#include <stdbool.h>
#include <stddef.h>

#include "binding/binding.h"

/* The kinds of types, their slots, and whether other threads may run while one of them waits for a page: not where C
 * code relies on an object of Python that they could change, as a bytearray that grows. */
#define ALL_KINDS(DO)                                                                                                  \
    DO(view, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                             \
    DO(view_iterator, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                    \
    DO(bytes, BYTES_SLOTS, 0)                                                                                          \
    DO(bytearray, BYTEARRAY_SLOTS, 0)                                                                                  \
    DO(array, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                            \
    DO(flat, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                             \
    DO(nditer, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                           \
    DO(broadcast, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                        \
    DO(record, ALL_SLOTS, PS_WRAPPER_YIELDS)                                                                           \
    DO(scalar, ALL_SLOTS, PS_WRAPPER_YIELDS)

/* Those that load from any buffer. */
#define BYTES_SLOTS(DO, kind)                                                                                          \
    DO(kind, sequence, sq_concat, binaryfunc)                                                                          \
    DO(kind, sequence, sq_contains, objobjproc)                                                                        \
    DO(kind, number, nb_remainder, binaryfunc)
#define BYTEARRAY_SLOTS(DO, kind)                                                                                      \
    BYTES_SLOTS(DO, kind)                                                                                              \
    DO(kind, type, tp_richcompare, richcmpfunc)                                                                        \
    DO(kind, mapping, mp_ass_subscript, objobjargproc)                                                                 \
    DO(kind, sequence, sq_inplace_concat, binaryfunc)

#define UNARY(DO, kind, slot) DO(kind, number, slot, unaryfunc)
#define BINARY(DO, kind, slot) DO(kind, number, slot, binaryfunc)
#define ALL_SLOTS(DO, kind)                                                                                            \
    DO(kind, type, tp_richcompare, richcmpfunc)                                                                        \
    DO(kind, type, tp_hash, hashfunc)                                                                                  \
    DO(kind, type, tp_iternext, unaryfunc)                                                                             \
    DO(kind, mapping, mp_ass_subscript, objobjargproc)                                                                 \
    DO(kind, mapping, mp_subscript, binaryfunc)                                                                        \
    DO(kind, sequence, sq_ass_item, ssizeobjargproc)                                                                   \
    DO(kind, sequence, sq_item, ssizeargfunc)                                                                          \
    DO(kind, sequence, sq_contains, objobjproc)                                                                        \
    DO(kind, number, nb_bool, inquiry)                                                                                 \
    DO(kind, number, nb_power, ternaryfunc)                                                                            \
    DO(kind, number, nb_inplace_power, ternaryfunc)                                                                    \
    UNARY(DO, kind, nb_negative)                                                                                       \
    UNARY(DO, kind, nb_positive)                                                                                       \
    UNARY(DO, kind, nb_absolute)                                                                                       \
    UNARY(DO, kind, nb_invert)                                                                                         \
    UNARY(DO, kind, nb_int)                                                                                            \
    UNARY(DO, kind, nb_float)                                                                                          \
    UNARY(DO, kind, nb_index)                                                                                          \
    BINARY(DO, kind, nb_add)                                                                                           \
    BINARY(DO, kind, nb_subtract)                                                                                      \
    BINARY(DO, kind, nb_multiply)                                                                                      \
    BINARY(DO, kind, nb_remainder)                                                                                     \
    BINARY(DO, kind, nb_divmod)                                                                                        \
    BINARY(DO, kind, nb_lshift)                                                                                        \
    BINARY(DO, kind, nb_rshift)                                                                                        \
    BINARY(DO, kind, nb_and)                                                                                           \
    BINARY(DO, kind, nb_xor)                                                                                           \
    BINARY(DO, kind, nb_or)                                                                                            \
    BINARY(DO, kind, nb_floor_divide)                                                                                  \
    BINARY(DO, kind, nb_true_divide)                                                                                   \
    BINARY(DO, kind, nb_matrix_multiply)                                                                               \
    BINARY(DO, kind, nb_inplace_add)                                                                                   \
    BINARY(DO, kind, nb_inplace_subtract)                                                                              \
    BINARY(DO, kind, nb_inplace_multiply)                                                                              \
    BINARY(DO, kind, nb_inplace_remainder)                                                                             \
    BINARY(DO, kind, nb_inplace_lshift)                                                                                \
    BINARY(DO, kind, nb_inplace_rshift)                                                                                \
    BINARY(DO, kind, nb_inplace_and)                                                                                   \
    BINARY(DO, kind, nb_inplace_xor)                                                                                   \
    BINARY(DO, kind, nb_inplace_or)                                                                                    \
    BINARY(DO, kind, nb_inplace_floor_divide)                                                                          \
    BINARY(DO, kind, nb_inplace_true_divide)                                                                           \
    BINARY(DO, kind, nb_inplace_matrix_multiply)

/* Of a type's own dictionary: an attribute that can be assigned to, and a method that a statement calls. */
#define ALL_SETTERS(DO)                                                                                                \
    DO(array, flat)                                                                                                    \
    DO(array, real)                                                                                                    \
    DO(array, imag)                                                                                                    \
    DO(nditer, iterindex)                                                                                              \
    DO(nditer, iterrange)
#define ALL_METHODS(DO) DO(array, __format__)

/* -- Where they are --------------------------------------------------------------------------------------------- */

#define KIND(kind, slots, yields) kind##_kind,
enum { ALL_KINDS(KIND) KINDS };
#define KIND_YIELDS(kind, slots, yields) kind##_yields = yields,
enum { ALL_KINDS(KIND_YIELDS) };

#define SLOT(kind, group, slot, signature) slot##_at,
enum { ALL_SLOTS(SLOT, ) sq_concat_at, sq_inplace_concat_at, SLOTS };
#define SETTER(kind, name) kind##_##name##_at,
enum { ALL_SETTERS(SETTER) SETTERS };
#define METHOD(kind, name) kind##_##name##_at,
enum { ALL_METHODS(METHOD) METHODS };

#define GROUP_type (-1) /* in the type itself */
#define GROUP_number ((ptrdiff_t)offsetof(PyTypeObject, tp_as_number))
#define GROUP_sequence ((ptrdiff_t)offsetof(PyTypeObject, tp_as_sequence))
#define GROUP_mapping ((ptrdiff_t)offsetof(PyTypeObject, tp_as_mapping))
#define IN_type PyTypeObject
#define IN_number PyNumberMethods
#define IN_sequence PySequenceMethods
#define IN_mapping PyMappingMethods
#define PLACE(kind, group, slot, signature) [slot##_at] = {GROUP_##group, offsetof(IN_##group, slot)},
static const struct place {
    ptrdiff_t group;
    size_t at;
} places[SLOTS] = {ALL_SLOTS(PLACE, ) PLACE(, sequence, sq_concat, ) PLACE(, sequence, sq_inplace_concat, )};

static void **slot_of(PyTypeObject *type, const struct place *place) {
    char *group = place->group < 0 ? (char *)type : *(char **)((char *)type + place->group);
    return group ? (void **)(group + place->at) : NULL;
}

/* -- The wrappers ----------------------------------------------------------------------------------------------- */

static void *originals[KINDS][SLOTS]; /* NULL: that kind has no such slot */
static setter original_setters[SETTERS];
static PyCFunction original_methods[METHODS];

#define FROM(kind, slot, signature) ((signature)originals[kind##_kind][slot##_at])
#define ENTER(kind)                                                                                                    \
    uintptr_t outer = ps_due.wrapper, mine = ps_due.wrapper = (uintptr_t)ps_frame_of(ps_thread_state()) | PS_WRAPPER | \
                                                              (uintptr_t)kind##_yields;
#define LEAVE                                                                                                          \
    ps_due.wrapper = outer;                                                                                            \
    if (__builtin_expect(ps_due.by == mine, 0))

static PyObject *tell_object(PyObject *result) {
    Py_XDECREF(result);
    ps_tell();
    return NULL;
}

static int tell_status(void) {
    ps_tell();
    return -1;
}

#define WRAPPER(type, kind, name, parameters, call, violated)                                                          \
    static type kind##_##name parameters {                                                                             \
        ENTER(kind)                                                                                                    \
        type result = call;                                                                                            \
        LEAVE return violated;                                                                                         \
        return result;                                                                                                 \
    }
#define OBJECT(kind, slot, signature, parameters, arguments)                                                           \
    WRAPPER(PyObject *, kind, slot, parameters, FROM(kind, slot, signature) arguments, tell_object(result))
#define STATUS(kind, slot, signature, parameters, arguments)                                                           \
    WRAPPER(int, kind, slot, parameters, FROM(kind, slot, signature) arguments, tell_status())

#define WRAP_unaryfunc(kind, slot) OBJECT(kind, slot, unaryfunc, (PyObject * a), (a))
#define WRAP_binaryfunc(kind, slot) OBJECT(kind, slot, binaryfunc, (PyObject * a, PyObject * b), (a, b))
#define WRAP_ternaryfunc(kind, slot)                                                                                   \
    OBJECT(kind, slot, ternaryfunc, (PyObject * a, PyObject * b, PyObject * c), (a, b, c))
#define WRAP_ssizeargfunc(kind, slot) OBJECT(kind, slot, ssizeargfunc, (PyObject * a, Py_ssize_t i), (a, i))
#define WRAP_richcmpfunc(kind, slot) OBJECT(kind, slot, richcmpfunc, (PyObject * a, PyObject * b, int how), (a, b, how))
#define WRAP_inquiry(kind, slot) STATUS(kind, slot, inquiry, (PyObject * a), (a))
#define WRAP_objobjproc(kind, slot) STATUS(kind, slot, objobjproc, (PyObject * a, PyObject * b), (a, b))
#define WRAP_objobjargproc(kind, slot)                                                                                 \
    STATUS(kind, slot, objobjargproc, (PyObject * a, PyObject * b, PyObject * c), (a, b, c))
#define WRAP_ssizeobjargproc(kind, slot)                                                                               \
    STATUS(kind, slot, ssizeobjargproc, (PyObject * a, Py_ssize_t i, PyObject * b), (a, i, b))
#define WRAP_hashfunc(kind, slot)                                                                                      \
    WRAPPER(Py_hash_t, kind, slot, (PyObject * a), FROM(kind, slot, hashfunc)(a), tell_status())
#define WRAP(kind, group, slot, signature) WRAP_##signature(kind, slot)
#define WRAP_KIND(kind, slots, yields) slots(WRAP, kind)
#define WRAP_SETTER(kind, name)                                                                                        \
    WRAPPER(int, kind, set_##name, (PyObject * a, PyObject * b, void *c),                                              \
            original_setters[kind##_##name##_at](a, b, c), tell_status())
#define WRAP_METHOD(kind, name)                                                                                        \
    WRAPPER(PyObject *, kind, call_##name, (PyObject * a, PyObject * b), original_methods[kind##_##name##_at](a, b),   \
            tell_object(result))
ALL_KINDS(WRAP_KIND)
ALL_SETTERS(WRAP_SETTER)
ALL_METHODS(WRAP_METHOD)

#define ADDRESS(kind, group, slot, signature) [slot##_at] = (void *)kind##_##slot,
#define ADDRESSES(kind, slots, yields) {slots(ADDRESS, kind)},
static void *const wrappers[KINDS][SLOTS] = {ALL_KINDS(ADDRESSES)};

/* -- Their installation ----------------------------------------------------------------------------------------- */

/* A new reference to the type's own dictionary. */
static PyObject *dictionary_of(PyTypeObject *type) {
#if PY_VERSION_HEX >= 0x030C0000
    return PyType_GetDict(type);
#else
    return Py_NewRef(type->tp_dict);
#endif
}

static void wrap_descriptors(int kind, PyObject *dictionary) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary, &at, &key, &value);) {
        if (!Py_IS_TYPE(value, &PyWrapperDescr_Type))
            continue;
        void **wrapped = &((PyWrapperDescrObject *)value)->d_wrapped;
        for (int slot = 0; slot < SLOTS; slot++)
            if (originals[kind][slot] && *wrapped == originals[kind][slot]) {
                *wrapped = wrappers[kind][slot];
                break;
            }
    }
}

static void wrap_slots(int kind, PyTypeObject *type) {
    for (int slot = 0; slot < SLOTS; slot++) {
        void **place = slot_of(type, &places[slot]);
        if (place && originals[kind][slot] && *place == originals[kind][slot])
            *place = wrappers[kind][slot];
    }
}

/* The type, and all that have inherited from it. */
static int wrap_all(int kind, PyTypeObject *type) {
    wrap_slots(kind, type);
    PyObject *subtypes = PyObject_CallMethod((PyObject *)&PyType_Type, "__subclasses__", "O", type);
    if (!subtypes)
        return -1;
    int rc = 0;
    for (Py_ssize_t i = 0; !rc && i < PyList_GET_SIZE(subtypes); i++)
        rc = wrap_all(kind, (PyTypeObject *)PyList_GET_ITEM(subtypes, i));
    Py_DECREF(subtypes);
    return rc;
}

static int wrap_kind(int kind, PyTypeObject *type) {
    for (int slot = 0; slot < SLOTS; slot++) {
        void **place = slot_of(type, &places[slot]);
        bool is_there = wrappers[kind][slot] && place && *place != (void *)PyObject_HashNotImplemented;
        originals[kind][slot] = is_there ? *place : NULL;
    }
    PyObject *dictionary = dictionary_of(type);
    wrap_descriptors(kind, dictionary);
    Py_DECREF(dictionary);
    return wrap_all(kind, type);
}

static void wrap_setter(PyObject *dictionary, const char *name, int index, setter wrapper) {
    PyObject *found = PyDict_GetItemString(dictionary, name);
    if (!found || !Py_IS_TYPE(found, &PyGetSetDescr_Type))
        return;
    PyGetSetDef *definition = ((PyGetSetDescrObject *)found)->d_getset;
    original_setters[index] = definition->set;
    if (definition->set)
        definition->set = wrapper;
}

static void wrap_method(PyObject *dictionary, const char *name, int index, PyCFunction wrapper) {
    PyObject *found = PyDict_GetItemString(dictionary, name);
    if (!found || !Py_IS_TYPE(found, &PyMethodDescr_Type))
        return;
    PyMethodDef *definition = ((PyMethodDescrObject *)found)->d_method;
    if (definition->ml_flags != METH_VARARGS)
        return;
    original_methods[index] = definition->ml_meth;
    definition->ml_meth = wrapper;
}

int ps_wrap_builtins(void) {
    static bool done;
    if (done)
        return 0;
    PyObject *view = PyMemoryView_FromMemory("", 0, PyBUF_READ);
    PyObject *iterator = view ? PyObject_GetIter(view) : NULL;
    Py_XDECREF(view);
    if (!iterator)
        return -1;
    done = true;
    int rc = wrap_kind(view_iterator_kind, Py_TYPE(iterator));
    Py_DECREF(iterator);
    rc = rc ? rc : wrap_kind(view_kind, &PyMemoryView_Type);
    rc = rc ? rc : wrap_kind(bytes_kind, &PyBytes_Type);
    return rc ? rc : wrap_kind(bytearray_kind, &PyByteArray_Type);
}

/* A record comes before its base, the scalar, whose wrappers it would take for its own slots. */
static const struct {
    int kind;
    const char *name;
} numpy_types[] = {{record_kind, "void"},   {scalar_kind, "generic"},      {flat_kind, "flatiter"},
                   {nditer_kind, "nditer"}, {broadcast_kind, "broadcast"}, {array_kind, "ndarray"}};
enum { NUMPY_TYPES = sizeof numpy_types / sizeof *numpy_types };

static int wrap_attributes(PyTypeObject *array, PyTypeObject *nditer) {
    PyObject *dictionary[KINDS] = {[array_kind] = dictionary_of(array), [nditer_kind] = dictionary_of(nditer)};
#define INSTALL_SETTER(kind, name) wrap_setter(dictionary[kind##_kind], #name, kind##_##name##_at, kind##_set_##name);
#define INSTALL_METHOD(kind, name) wrap_method(dictionary[kind##_kind], #name, kind##_##name##_at, kind##_call_##name);
    ALL_SETTERS(INSTALL_SETTER)
    ALL_METHODS(INSTALL_METHOD)
    Py_DECREF(dictionary[array_kind]);
    Py_DECREF(dictionary[nditer_kind]);
    return 0;
}

/* Once all of it is there: another thread may be importing it. */
int ps_wrap_numpy(PyObject *numpy) {
    static bool done;
    PyObject *types[NUMPY_TYPES] = {NULL};
    bool all = true;
    int rc = 0;
    if (done)
        return 0;
    for (int i = 0; i < NUMPY_TYPES && all; i++) {
        types[i] = PyObject_GetAttrString(numpy, numpy_types[i].name);
        all = types[i] && PyType_Check(types[i]);
    }
    PyErr_Clear();
    if (all) {
        done = true;
        for (int i = 0; i < NUMPY_TYPES && !rc; i++)
            rc = wrap_kind(numpy_types[i].kind, (PyTypeObject *)types[i]);
        rc = rc ? rc : wrap_attributes((PyTypeObject *)types[NUMPY_TYPES - 1], (PyTypeObject *)types[3]);
    }
    for (int i = 0; i < NUMPY_TYPES; i++)
        Py_XDECREF(types[i]);
    return rc;
}
