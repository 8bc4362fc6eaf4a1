/* proc.c - what /proc says of a process: when it began, whether it is gone, its command line.
 *
 * Invariant: only ENOENT and ESRCH say that a process is gone; any other error
 * says that we could not look.
 * Runs in: caller, agent, signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "os/os.h"

#define COMMAND_LINE 1024        /* bytes of it that are read */
#define INITIAL_TIME 0xEFFFFFFAu /* inode of the first time namespace (PROC_TIME_INIT_INO, linux/proc_ns.h) */
#define TICKS 100u               /* a second, where x86-64 tells clock ticks (USER_HZ) */

struct dirent64 {
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

/* -- Sockets ------------------------------------------------------------------------------------------------------ */

/* Reads a small file of /proc; the length, or -errno. */
static int read_file(const char *path, char *to, size_t size) {
    int fd = ps_sys_result(open(path, O_RDONLY | O_CLOEXEC));
    if (fd < 0)
        return fd;
    int length = ps_sys_result(read(fd, to, size - 1));
    close(fd);
    to[length < 0 ? 0 : length] = 0;
    return length;
}

static uint64_t number_of(const char *digits) {
    uint64_t number = 0;
    while (*digits >= '0' && *digits <= '9')
        number = number * 10 + (uint64_t)(*digits++ - '0');
    return number;
}

static const char *next_word(const char *text) {
    while (*text && *text != ' ')
        text++;
    while (*text == ' ')
        text++;
    return text;
}

/* Clock ticks by which our time namespace shifts what is told in the machine's boot time.  Who has made one for its
 * children is told theirs, so it does not know its own. */
static bool boottime_shift(uint64_t *ticks) {
    struct stat own, children;
    char text[128];
    *ticks = 0;
    if (stat("/proc/self/ns/time", &own))
        return errno == ENOENT; /* of a kernel without them */
    if (own.st_ino == INITIAL_TIME)
        return true;
    if (stat("/proc/self/ns/time_for_children", &children) || children.st_ino != own.st_ino ||
        read_file("/proc/self/timens_offsets", text, sizeof text) <= 0)
        return false;
    const char *line = strchr(text, '\n'); /* the second is "boottime SECONDS NANOSECONDS" */
    const char *seconds = line ? next_word(line + 1) : text, *nanoseconds = next_word(seconds);
    uint64_t whole = number_of(*seconds == '-' ? seconds + 1 : seconds) * TICKS;
    *ticks = (*seconds == '-' ? -whole : whole) + number_of(nanoseconds) / (1000000000 / TICKS);
    return true;
}

uint64_t ps_sys_start_time(int pid) {
    char path[48], text[1024], *end = path;
    uint64_t shift;
    ps_sys_put_text(&end, "/proc/");
    ps_sys_put_number(&end, (unsigned long)pid);
    ps_sys_put_text(&end, "/stat");
    if (!boottime_shift(&shift) || read_file(path, text, sizeof text) <= 0)
        return 0;
    char *at = strrchr(text, ')'); /* the command may hold spaces and parentheses */
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? number_of(at + 1) - shift : 0;
}

uint64_t ps_sys_pid_namespace(void) {
    struct stat ns;
    return stat("/proc/thread-self/ns/pid", &ns) ? 0 : (uint64_t)ns.st_ino;
}

void ps_sys_command(char *to, size_t size) {
    char line[COMMAND_LINE];
    int length = read_file("/proc/self/cmdline", line, sizeof line);
    size_t word = 0, end = 0;
    for (int i = 0; i < length; i++) {
        if (line[i] == '/')
            end = word;
        else if (end < size - 1)
            to[end++] = line[i] ? line[i] : ' ';
        if (!line[i])
            word = end;
    }
    to[end && to[end - 1] == ' ' ? end - 1 : end] = 0; /* each word ends with a NUL, the last one too */
}

/* A /proc of another pid namespace (a container's) speaks of other processes under our numbers. */
static bool proc_is_ours(void) {
    char text[24], mine[24], *end = mine;
    ssize_t length = readlink("/proc/self", text, sizeof text - 1);
    ps_sys_put_number(&end, (unsigned long)getpid());
    return length > 0 && (size_t)length == strlen(mine) && !memcmp(text, mine, (size_t)length);
}

/* Where its file cannot be read (no descriptor is left, /proc hides it), only of one that is no more. */
static bool thread_without_memory(const char *statm, int pid, int tid) {
    char text[64];
    return read_file(statm, text, sizeof text) > 0 ? !memcmp(text, "0 ", 2) : !ps_sys_thread_is_there(pid, tid);
}

/* 1: every thread has given up its memory; 0: one has not; -errno: cannot tell. */
static int threads_without_memory(int pid) {
    char path[64], buffer[2048] __attribute__((aligned(8))), *tasks = path;
    ps_sys_put_text(&tasks, "/proc/");
    ps_sys_put_number(&tasks, (unsigned long)pid);
    ps_sys_put_text(&tasks, "/task");
    int dir = ps_sys_result(open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)), length, seen = 0, held = 0;
    if (dir < 0)
        return dir;
    while (!held && (length = ps_sys_result(syscall(SYS_getdents64, dir, buffer, sizeof buffer))) > 0)
        for (int at = 0; at < length && !held; at += ((struct dirent64 *)(buffer + at))->length) {
            const char *name = ((struct dirent64 *)(buffer + at))->name;
            char *end = tasks;
            if (name[0] == '.' || strlen(name) > 10)
                continue;
            seen++;
            ps_sys_put_text(&end, "/");
            ps_sys_put_text(&end, name);
            ps_sys_put_text(&end, "/statm");
            held = !thread_without_memory(path, pid, (int)number_of(name));
        }
    close(dir);
    return held ? 0 : length < 0 ? length : seen ? 1 : -ESRCH;
}

static bool pidfd_says_gone(int pid) {
    int fd = ps_sys_result(syscall(SYS_pidfd_open, pid, 0));
    if (fd < 0)
        return fd == -ESRCH;
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    bool gone = poll(&poller, 1, 0) == 1 && poller.revents & POLLIN;
    close(fd);
    return gone;
}

bool ps_sys_process_gone(int pid) {
    if (pid <= 0)
        return false;
    if (kill(pid, 0) && errno == ESRCH)
        return true;
    if (!proc_is_ours())
        return pidfd_says_gone(pid);
    /* Twice: a directory that is read while threads come and go may miss one. */
    if (threads_without_memory(pid) == 1 && threads_without_memory(pid) == 1)
        return true;
    return pidfd_says_gone(pid);
}
