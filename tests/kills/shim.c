/* Counts what a process does to the files below a folder, and kills it at one of these operations, or fills the disk from one on.
   Preloaded in front of libc; armed by the test with `arm`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, BEFORE, AFTER, HALF, FULL };
static char root[PATH_MAX];
static int how = OFF, at, done, logged = -1;

void arm(const char *folder, int mode, int operation, int log_fd) {
    snprintf(root, sizeof root, "%s/", folder);
    how = mode; at = operation; done = 0; logged = log_fd;
}
int operations(void) { return done; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static int below(int dir, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (how == OFF || !path) return 0;
    if (path[0] == '/') return !strncmp(path, root, strlen(root));
    if (dir == AT_FDCWD) { if (!getcwd(full, PATH_MAX)) return 0; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, full, PATH_MAX - 1);
        if (n < 0) return 0;
        full[n] = 0;
    }
    strcat(full, "/"); strncat(full, path, PATH_MAX - 1);
    return !strncmp(full, root, strlen(root));
}
static int below_fd(int fd) {
    char link[64], full[PATH_MAX];
    if (how == OFF || fd < 3 || fd == logged) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, sizeof full - 1);
    if (n < 0) return 0;
    full[n] = 0;
    return !strncmp(full, root, strlen(root));
}

/* 1: this operation must fail for want of space */
static int begin(const char *what, const char *path) {
    char line[PATH_MAX + 64];
    int n = snprintf(line, sizeof line, "%s %s\n", what, path ? path : "");
    done++;
    if (logged >= 0) { REAL(write); if (real(logged, line, n) < 0) {} }
    if (how == BEFORE && done == at) die();
    return how == FULL && done >= at;
}
static void end(void) { if ((how == AFTER || how == HALF) && done == at) die(); }
#define NO_SPACE { errno = ENOSPC; return -1; }

#define OPENING(name, params, dir, path, args) \
    int name params { \
        REAL(name); mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
        if (!(flags & (O_WRONLY | O_RDWR | O_CREAT)) || !below(dir, path)) return real args; \
        if (begin("open", path)) NO_SPACE \
        int fd = real args; end(); return fd; }
OPENING(open, (const char *path, int flags, ...), AT_FDCWD, path, (path, flags, mode))
OPENING(open64, (const char *path, int flags, ...), AT_FDCWD, path, (path, flags, mode))
OPENING(openat, (int dir, const char *path, int flags, ...), dir, path, (dir, path, flags, mode))
OPENING(openat64, (int dir, const char *path, int flags, ...), dir, path, (dir, path, flags, mode))

#define FOPENING(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (!strpbrk(mode, "wa+") || !below(AT_FDCWD, path)) return real(path, mode); \
        if (begin("open", path)) { errno = ENOSPC; return NULL; } \
        FILE *f = real(path, mode); end(); return f; }
FOPENING(fopen)
FOPENING(fopen64)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    if (!below_fd(fd)) return real(fd, data, n);
    if (begin("write", "")) NO_SPACE
    ssize_t r = real(fd, data, how == HALF && done == at ? n / 2 : n);
    end(); return r;
}
ssize_t writev(int fd, const struct iovec *data, int n) {
    REAL(writev);
    if (!below_fd(fd)) return real(fd, data, n);
    if (begin("write", "")) NO_SPACE
    ssize_t r = real(fd, data, how == HALF && done == at ? n / 2 : n);
    end(); return r;
}

/* names that go or come: never for want of space, but mkdir */
#define NAMING(type, name, params, test, path, args, needs_space) \
    type name params { \
        REAL(name); \
        if (!(test)) return real args; \
        if (begin(#name, path) && needs_space) NO_SPACE \
        type r = real args; end(); return r; }
NAMING(int, rename, (const char *a, const char *b), below(AT_FDCWD, b), b, (a, b), 0)
NAMING(int, renameat, (int d, const char *a, int e, const char *b), below(e, b), b, (d, a, e, b), 0)
NAMING(int, unlink, (const char *a), below(AT_FDCWD, a), a, (a), 0)
NAMING(int, unlinkat, (int d, const char *a, int f), below(d, a), a, (d, a, f), 0)
NAMING(int, rmdir, (const char *a), below(AT_FDCWD, a), a, (a), 0)
NAMING(int, mkdir, (const char *a, mode_t m), below(AT_FDCWD, a), a, (a, m), 1)
NAMING(int, mkdirat, (int d, const char *a, mode_t m), below(d, a), a, (d, a, m), 1)
NAMING(int, ftruncate, (int fd, off_t n), below_fd(fd), "", (fd, n), 0)
