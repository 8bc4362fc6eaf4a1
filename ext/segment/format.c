/* format.c - where in the memfd what lies; and the check of one that somebody hands us.
 *
 * The only place where foreign bytes become trusted: after ps_region_validate
 * nothing of the first lines of the header is read again.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "segment/segment.h"
#include "types.h"

static uint64_t whole_pages(uint64_t bytes) {
    return (bytes + PS_PAGE - 1) / PS_PAGE * PS_PAGE;
}

static uint64_t section_length(enum ps_section_kind kind, uint64_t pages, uint32_t slots, uint32_t areas) {
    switch (kind) {
    case PS_SEC_SLOTS:
        return slots * sizeof(struct ps_shm_slot);
    case PS_SEC_RING:
        return PS_RING * sizeof(struct ps_shm_ring);
    case PS_SEC_CUR:
    case PS_SEC_OLD:
        return pages;
    case PS_SEC_LEASE:
        return pages * sizeof(uint64_t);
    case PS_SEC_LOCK:
        return PS_LOCKS * sizeof(struct ps_shm_lock);
    case PS_SEC_KEPT:
        return pages;
    case PS_SEC_STATE:
        return areas * whole_pages(pages);
    case PS_SEC_STAMP:
        return pages * sizeof(uint64_t);
    case PS_SEC_VIOLATION:
        return PS_VIOLATIONS * sizeof(struct ps_shm_violation);
    default:
        return 0;
    }
}

uint64_t ps_region_file_length(const struct ps_shm_header *header) {
    return header->control_size + (1 + (uint64_t)header->areas) * header->pages * PS_PAGE;
}

/* As many as leave room for the data and its other mappings.  Huge pages can neither be holes nor be written to by
 * system calls, which saving needs. */
static uint32_t areas_for(uint64_t pages, uint32_t page_size) {
    uint64_t room = page_size > PS_PAGE ? 0 : PS_FAR_SIZE / 2 / (pages * PS_PAGE);
    return room < 5 ? 0 : room - 4 < PS_SNAPSHOTS ? (uint32_t)room - 4 : PS_SNAPSHOTS;
}

/* As many as the size takes, of whole units. */
static uint64_t data_pages(const struct ps_shm_header *header) {
    return (header->size + header->page_size - 1) / header->page_size * (header->page_size / PS_PAGE);
}

/* What follows from size, page size, slots and flags. */
void ps_region_lay_out(struct ps_shm_header *header) {
    /* A transparent huge page begins on its own boundary in the memfd too. */
    uint64_t at = PS_PAGE, unit = header->flags & PS_REGION_THP ? PS_BOUNDARY : header->page_size;
    header->pages = data_pages(header);
    header->areas = areas_for(header->pages, header->page_size);
    for (uint32_t kind = PS_SEC_SLOTS; kind <= PS_SEC_LAST; kind++) {
        uint64_t length = section_length((enum ps_section_kind)kind, header->pages, header->slots, header->areas);
        header->section[kind - 1] = (struct ps_shm_section){.kind = kind, .offset = at, .length = length};
        at = whole_pages(at + length);
    }
    header->control_size = (at + unit - 1) / unit * unit;
}

static const char *check_sections(const struct ps_shm_header *header, struct ps_shape *shape) {
    for (uint32_t i = 0; i < PS_SECTIONS && header->section[i].kind != PS_SEC_END; i++) {
        const struct ps_shm_section *section = &header->section[i];
        if (section->kind >= PS_SECTIONS)
            continue; /* of a later version that says we may ignore it */
        uint64_t end = header->control_size;
        if (section->offset % PS_PAGE || section->offset < PS_PAGE || section->offset > end ||
            section->length > end - section->offset)
            return "section";
        if (section->length <
            section_length((enum ps_section_kind)section->kind, header->pages, header->slots, header->areas))
            return "section length";
        shape->offset[section->kind] = section->offset;
    }
    for (uint32_t kind = PS_SEC_SLOTS; kind <= PS_SEC_LAST; kind++)
        if (!shape->offset[kind])
            return "section table";
    return NULL;
}

/* As _names.py has it, or "". */
static bool is_name(const char *name, size_t size) {
    size_t length = strnlen(name, size);
    return length <= PS_NAME_MAX && name[0] != '.' &&
           strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") >= length;
}

static const char *check_header(const struct ps_shm_header *header, uint64_t file_size, uint64_t file_page) {
    if (header->magic != PS_MAGIC)
        return "magic";
    if (header->version != PS_VERSION)
        return "version";
    if (header->page_size != file_page)
        return "page_size";
    if (!header->slots || header->slots > PS_SLOTS_MAX)
        return "slots";
    if (header->initial > 7)
        return "initial";
    if (header->policy > PS_WAIT)
        return "policy";
    if (header->areas > (header->page_size > PS_PAGE ? 0 : PS_SNAPSHOTS))
        return "areas";
    if (header->flags > (PS_REGION_THP | PS_REGION_LOCK | PS_REGION_RESERVED))
        return "flags";
    if (!header->size || header->size > file_size || header->pages != data_pages(header))
        return "size";
    if (header->control_size % header->page_size || header->control_size > file_size ||
        file_size != ps_region_file_length(header))
        return "control_size";
    return is_name(header->name, sizeof header->name) ? NULL : "name";
}

/* Bytes of the pages of which the file is made, as the kernel has it. */
static int64_t page_of_file(int fd) {
    struct statfs kind;
    return fstatfs(fd, &kind) ? -errno : kind.f_type == HUGETLBFS_MAGIC ? (int64_t)kind.f_bsize : (int64_t)PS_PAGE;
}

int ps_region_validate(int fd, struct ps_shape *shape, const char **field) {
    struct ps_shm_header header;
    struct stat file;
    if (fstat(fd, &file))
        return -errno;
    *field = "seals";
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & PS_SEALS) != PS_SEALS)
        return PS_ECORRUPT;
    *field = "length";
    if (pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header)
        return PS_ECORRUPT;
    int64_t page = page_of_file(fd);
    if (page < 0)
        return (int)page;
    memset(shape, 0, sizeof *shape);
    *field = check_header(&header, (uint64_t)file.st_size, (uint64_t)page);
    if (!*field)
        *field = check_sections(&header, shape);
    if (*field)
        return PS_ECORRUPT;
    shape->control_size = header.control_size;
    shape->size = header.size;
    shape->pages = header.pages;
    shape->unit = header.page_size / PS_PAGE;
    shape->flags = header.flags;
    shape->slots = header.slots;
    shape->initial = header.initial;
    shape->policy = header.policy;
    shape->areas = header.areas;
    shape->created = header.created;
    shape->creator = header.creator;
    memcpy(shape->nonce, header.nonce, sizeof shape->nonce);
    memcpy(shape->name, header.name, sizeof shape->name);
    return 0;
}

/* -- Descriptors --------------------------------------------------------------------------------------------- */

/* The next run of pages from *page on that the memfd really holds, of so many that begin at `begin`; a count of 0:
 * there is none. */
int ps_region_data(int fd, uint64_t begin, uint64_t pages, uint64_t *page, uint64_t *count) {
    *count = 0;
    off_t end = (off_t)(begin + pages * PS_PAGE), data = lseek(fd, (off_t)(begin + *page * PS_PAGE), SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? 0 : -errno;
    off_t hole = data < end ? lseek(fd, data, SEEK_HOLE) : end;
    if (hole < 0)
        return -errno;
    if (data < end) {
        *page = ((uint64_t)data - begin) / PS_PAGE;
        *count = ((uint64_t)(hole < end ? hole : end) - begin) / PS_PAGE - *page;
    }
    return 0;
}
