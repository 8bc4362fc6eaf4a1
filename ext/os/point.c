/* point.c - the crash points of point.h: what is done where a test has asked for it.
 *
 * Lives here: reading PYSHARE_POINT, and killing, stopping or ending.  Empty
 * where the points are not built in: its state is not the library's.
 * Runs in: caller, agent, signal handler, forked child.
 */
#define _GNU_SOURCE
#include "os/point.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "os/os.h"

#ifdef PS_POINTS
static struct {
    char label[24];
    char action; /* first letter; 0: none */
    _Atomic int32_t left;
} point;

void ps_point_reload(void) {
    const char *text = getenv("PYSHARE_POINT"), *equals = text ? strchr(text, '=') : NULL;
    point.action = 0;
    if (!equals || equals - text >= (ptrdiff_t)sizeof point.label)
        return;
    memcpy(point.label, text, (size_t)(equals - text));
    point.label[equals - text] = 0;
    const char *times = strchr(equals, '@');
    point.left = times ? atoi(times + 1) : 1;
    point.action = equals[1];
}

void ps_point_hit(const char *label) {
    if (!point.action || strcmp(label, point.label) || atomic_fetch_sub(&point.left, 1) != 1)
        return;
    if (point.action == 'k')
        kill(getpid(), SIGKILL);
    else if (point.action == 's')
        pthread_kill(pthread_self(), SIGSTOP); /* sent to the process, it would let this thread go on for a while */
    else
        ps_sys_exit_thread();
}
#endif
