/* probe.h - diagnosis only: what `pyshare doctor` asks the kernel.
 *
 * Lives here: each call that a region rests on, tried by itself, without the ways out that the core has.
 * Results are a descriptor, 0, or -errno.
 * Not here: calls that Python has; the order of the questions, what an answer means (pyshare/doctor.py).
 */
#ifndef PS_PROBE_H
#define PS_PROBE_H

#include <stdint.h>

/* Could a thread have a table of its own that holds `fd` alone, while the other threads keep theirs? */
int probe_private_table(int fd);
/* Does the kernel mark a word when a thread ends? */
int probe_death_mark(void);
/* Can one sleep on several words? */
int probe_waitv(void);
/* Does a mapping keep a file open that no descriptor leads to any more? */
int probe_keep_open(void);
/* prctl(PR_GET_DUMPABLE): 1 if other processes of this user may look into this one. */
int probe_dumpable(void);

int probe_userfaultfd(int flags); /* UFFD_USER_MODE_ONLY is added */
/* Once a descriptor.  What the kernel has beside `wanted` comes back too. */
int probe_uffd_features(int uffd, uint64_t wanted, uint64_t *offered);

#endif
