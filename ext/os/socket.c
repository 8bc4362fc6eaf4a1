/* socket.c - the Unix socket of a participant, from which others ask for its userfaultfd.
 *
 * Lives here: datagrams of one descriptor between processes of one user; the
 * kernel names the sender.
 * Not here: what is asked for and why (change/borrow.c).
 * Runs in: caller (asking), agent (answering).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "os/os.h"

/* An abstract address: a zero byte and what follows it, here five hexadecimal digits (unix(7), "Autobind feature"). */
#define DIGITS 5
#define ADDRESS_LENGTH (offsetof(struct sockaddr_un, sun_path) + 1 + DIGITS)

union control {
    struct cmsghdr header; /* for its alignment */
    char space[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
};

static int bind_anywhere(int fd, uint32_t *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t length = sizeof address;
    int rc = ps_sys_result(bind(fd, (struct sockaddr *)&address, sizeof address.sun_family));
    if (!rc)
        rc = ps_sys_result(getsockname(fd, (struct sockaddr *)&address, &length));
    if (!rc && length != ADDRESS_LENGTH)
        rc = -EINVAL;
    *name = 0;
    for (int i = 1; !rc && i <= DIGITS; i++) {
        char digit = address.sun_path[i];
        *name = *name << 4 | (uint32_t)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    return rc;
}

int ps_sys_socket(uint32_t *name) {
    int on = 1, fd = ps_sys_result(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    int rc = fd < 0 ? fd : ps_sys_result(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    if (!rc)
        rc = bind_anywhere(fd, name);
    if (rc < 0 && fd >= 0)
        close(fd);
    return rc < 0 ? rc : fd;
}

int ps_sys_socket_ask(int socket, uint32_t name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    for (int i = 0; i < DIGITS; i++)
        address.sun_path[1 + i] = "0123456789abcdef"[name >> 4 * (DIGITS - 1 - i) & 15];
    return ps_sys_result(sendto(socket, "", 1, MSG_NOSIGNAL, (struct sockaddr *)&address, ADDRESS_LENGTH));
}

/* The padding of a control message for one descriptor has room for a second: it must not stay open. */
static int only_one(struct cmsghdr *rights) {
    int fds[2] = {-1, -1};
    size_t length = rights->cmsg_len - CMSG_LEN(0);
    memcpy(fds, CMSG_DATA(rights), length < sizeof fds ? length : sizeof fds);
    if (fds[1] >= 0)
        close(fds[1]);
    return fds[0];
}

struct message {
    struct sockaddr_un from;
    struct ucred who;
    int fd; /* -1: none came with it */
    uint32_t number;
};

static int receive(int socket, struct message *got) {
    union control control;
    struct iovec io = {&got->number, sizeof got->number};
    struct msghdr message = {.msg_name = &got->from,
                             .msg_namelen = sizeof got->from,
                             .msg_iov = &io,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = sizeof control.space};
    int rc = ps_sys_result(recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT));
    got->fd = -1;
    got->who = (struct ucred){.pid = 0, .uid = (uid_t)-1};
    if (rc < 0)
        return rc;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(&message); at; at = CMSG_NXTHDR(&message, at)) {
        if (at->cmsg_level == SOL_SOCKET && at->cmsg_type == SCM_CREDENTIALS)
            memcpy(&got->who, CMSG_DATA(at), sizeof got->who);
        if (at->cmsg_level == SOL_SOCKET && at->cmsg_type == SCM_RIGHTS)
            got->fd = only_one(at);
    }
    return 0;
}

int ps_sys_socket_answer(int socket, int fd, uint32_t number) {
    struct message asked;
    int rc = receive(socket, &asked);
    if (rc)
        return rc;
    if (asked.fd >= 0) /* nobody who asks sends one */
        close(asked.fd);
    if (asked.who.uid != geteuid())
        return -EPERM;
    union control control = {.space = {0}};
    struct iovec io = {&number, sizeof number};
    struct msghdr message = {.msg_name = &asked.from,
                             .msg_namelen = ADDRESS_LENGTH,
                             .msg_iov = &io,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = CMSG_SPACE(sizeof fd)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    rc = ps_sys_result(sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT));
    return rc < 0 ? rc : 0;
}

int ps_sys_socket_take(int socket, int *pid, int *fd, uint32_t *number) {
    struct message answer;
    int rc = receive(socket, &answer);
    *pid = answer.who.uid == geteuid() ? answer.who.pid : 0;
    *fd = answer.fd;
    *number = answer.number;
    return rc;
}

int ps_sys_socket_wait(int socket, int64_t deadline) {
    int64_t left = deadline - ps_sys_now();
    struct pollfd poller = {.fd = socket, .events = POLLIN};
    int rc = ps_sys_result(poll(&poller, 1, left <= 0 ? 0 : (int)(left / PS_MS) + 1));
    return rc < 0 ? rc : rc ? 0 : -ETIMEDOUT;
}
