/* A disk that fails when it is told to, and one that forgets what was not synced.
 *
 * Preloaded (LD_PRELOAD) into the gateway, it stands before libc's calls on files below the directory FAULT_DIRECTORY. The
 * file FAULT_CONTROL says what fails, in one line; without it nothing does:
 *
 *     CALLS ERRNO SUFFIX SKIP COUNT        as in `sync,write 5 -wal 3 1`
 *
 * CALLS are of open (for writing), read, write, sync and truncate; SUFFIX is how the path ends, `*` for any; of the calls that
 * fit, SKIP pass, COUNT fail, and the rest passes again. A write that fails for want of room writes its first half. A sync
 * that fails takes a tenth of a second, as on disks that are about to die.
 *
 * FAULT_SHADOW is a directory with what a power cut would leave: of each file the bytes that were written before a sync that
 * succeeded. A sync that fails takes what was written before it out of that for good, as operating systems do: they mark the
 * pages clean, and the next sync succeeds without them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILES = 16, SPANS = 1 << 16, PATH = 512 };

/* What was written and not synced. */
struct span {
    off_t from, to;
};

static struct file {
    char path[PATH];
    struct span *spans;
    int count;
    /* The least size it was cut to since the last sync; -1 where it was not. */
    off_t cut;
} files[FILES];

static struct {
    char text[256];
    long seen;
} rule;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *directory, *control, *shadow;

#define REAL(name, ...) ((__typeof__(&name))real(#name))(__VA_ARGS__)

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void begin(void) {
    directory = getenv("FAULT_DIRECTORY");
    control = getenv("FAULT_CONTROL");
    shadow = getenv("FAULT_SHADOW");
}

static int ends_with(const char *text, const char *end) {
    size_t length = strlen(text), part = strlen(end);
    return length >= part && strcmp(text + length - part, end) == 0;
}

static int is_below(const char *path) {
    return directory && strncmp(path, directory, strlen(directory)) == 0;
}

static int path_of(int fd, char path[PATH]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH - 1);
    if (!directory || length < 0)
        return 0;
    path[length] = 0;
    return is_below(path);
}

/* The error with which the call has to fail; 0 where it passes. Called under the lock. */
static int fault(const char *call, const char *path) {
    char text[256], calls[64], suffix[64];
    int number, file = control ? REAL(open, control, O_RDONLY | O_CLOEXEC) : -1;
    long skip, count;
    if (file < 0)
        return 0;
    ssize_t length = REAL(read, file, text, sizeof text - 1);
    close(file);
    text[length < 0 ? 0 : length] = 0;
    if (strcmp(text, rule.text) != 0) {
        strcpy(rule.text, text);
        rule.seen = 0;
    }
    if (sscanf(text, "%63s %d %63s %ld %ld", calls, &number, suffix, &skip, &count) != 5)
        return 0;
    if (!strstr(calls, call) || (strcmp(suffix, "*") != 0 && !ends_with(path, suffix)))
        return 0;
    long at = rule.seen++;
    return at >= skip && at - skip < count ? number : 0;
}

static struct file *file_of(const char *path) {
    for (int i = 0; shadow && i < FILES; i++) {
        if (!files[i].path[0]) {
            snprintf(files[i].path, PATH, "%s", path);
            files[i].spans = malloc(SPANS * sizeof *files[i].spans);
            files[i].cut = -1;
        }
        if (strcmp(files[i].path, path) == 0)
            return &files[i];
    }
    return NULL;
}

static void note_write(const char *path, off_t from, ssize_t length) {
    struct file *file = file_of(path);
    if (!file || length <= 0)
        return;
    if (file->count == SPANS)
        abort();
    file->spans[file->count++] = (struct span){from, from + length};
}

static void note_cut(const char *path, off_t size) {
    struct file *file = file_of(path);
    if (!file)
        return;
    file->cut = file->cut < 0 || size < file->cut ? size : file->cut;
    for (int i = 0; i < file->count; i++)
        if (file->spans[i].to > size)
            file->spans[i].to = size > file->spans[i].from ? size : file->spans[i].from;
}

static void shadow_path(const char *path, char there[PATH]) {
    snprintf(there, PATH, "%s%s", shadow, path + strlen(directory));
}

/* What was written reaches the shadow. */
static void keep(const char *path) {
    struct file *file = file_of(path);
    char there[PATH], bytes[65536];
    if (!file)
        return;
    shadow_path(path, there);
    int from = REAL(open, path, O_RDONLY | O_CLOEXEC), to = REAL(open, there, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    struct stat stat;
    if (file->cut >= 0 && fstat(to, &stat) == 0 && stat.st_size > file->cut && REAL(ftruncate, to, file->cut) < 0)
        abort();
    for (int i = 0; i < file->count; i++) {
        for (off_t at = file->spans[i].from; at < file->spans[i].to;) {
            size_t most = file->spans[i].to - at < (off_t)sizeof bytes ? (size_t)(file->spans[i].to - at) : sizeof bytes;
            ssize_t read = REAL(pread, from, bytes, most, at);
            if (read <= 0)
                break;
            if (REAL(pwrite, to, bytes, read, at) != read)
                abort();
            at += read;
        }
    }
    close(from);
    close(to);
    file->count = 0;
    file->cut = -1;
}

static void forget(const char *path) {
    struct file *file = file_of(path);
    if (file)
        file->count = 0;
}

static int guarded_open(const char *name, const char *path, int flags, mode_t mode) {
    if (is_below(path) && (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) {
        pthread_mutex_lock(&lock);
        int error = fault("open", path);
        pthread_mutex_unlock(&lock);
        if (error) {
            errno = error;
            return -1;
        }
    }
    return ((int (*)(const char *, int, ...))real(name))(path, flags, mode);
}

static mode_t mode_of(int flags, va_list list) { return flags & O_CREAT ? va_arg(list, mode_t) : 0; }

#define OPEN(name)                                     \
    int name(const char *path, int flags, ...) {       \
        va_list list;                                  \
        va_start(list, flags);                         \
        mode_t mode = mode_of(flags, list);            \
        va_end(list);                                  \
        return guarded_open(#name, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

static ssize_t guarded_write(int fd, const void *bytes, size_t length, off_t at) {
    char path[PATH];
    if (!path_of(fd, path))
        return REAL(pwrite, fd, bytes, length, at);
    pthread_mutex_lock(&lock);
    int error = fault("write", path);
    ssize_t written = -1;
    if (error == ENOSPC)
        length /= 2;
    if (!error || (error == ENOSPC && length > 0)) {
        written = REAL(pwrite, fd, bytes, length, at);
        error = errno;
    }
    note_write(path, at, written);
    pthread_mutex_unlock(&lock);
    errno = error;
    return written;
}
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) {
    char path[PATH];
    return path_of(fd, path) ? guarded_write(fd, bytes, length, at) : REAL(pwrite, fd, bytes, length, at);
}
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) { return pwrite(fd, bytes, length, at); }

ssize_t write(int fd, const void *bytes, size_t length) {
    char path[PATH];
    struct stat stat;
    /* Sockets, pipes and terminals first: they are most of it. */
    if (!directory || fstat(fd, &stat) < 0 || !S_ISREG(stat.st_mode) || !path_of(fd, path))
        return REAL(write, fd, bytes, length);
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t written = guarded_write(fd, bytes, length, at);
    if (written > 0)
        lseek(fd, at + written, SEEK_SET);
    return written;
}

ssize_t pread(int fd, void *bytes, size_t length, off_t at) {
    char path[PATH];
    if (path_of(fd, path)) {
        pthread_mutex_lock(&lock);
        int error = fault("read", path);
        pthread_mutex_unlock(&lock);
        if (error) {
            errno = error;
            return -1;
        }
    }
    return REAL(pread, fd, bytes, length, at);
}
ssize_t pread64(int fd, void *bytes, size_t length, off64_t at) { return pread(fd, bytes, length, at); }

static int guarded_sync(const char *name, int fd) {
    char path[PATH];
    int (*sync)(int) = (int (*)(int))real(name);
    if (!path_of(fd, path))
        return sync(fd);
    pthread_mutex_lock(&lock);
    int error = fault("sync", path), done = -1;
    if (error) {
        forget(path);
        usleep(100000);
        errno = error;
    } else {
        done = sync(fd);
        struct stat stat;
        if (fstat(fd, &stat) == 0 && S_ISREG(stat.st_mode))
            keep(path);
    }
    pthread_mutex_unlock(&lock);
    return done;
}
int fsync(int fd) { return guarded_sync("fsync", fd); }
int fdatasync(int fd) { return guarded_sync("fdatasync", fd); }

int ftruncate(int fd, off_t size) {
    char path[PATH];
    if (!path_of(fd, path))
        return REAL(ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    int error = fault("truncate", path), done = -1;
    if (error) {
        errno = error;
    } else {
        done = REAL(ftruncate, fd, size);
        note_cut(path, size);
    }
    pthread_mutex_unlock(&lock);
    return done;
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

int unlink(const char *path) {
    int done = REAL(unlink, path);
    if (done == 0 && shadow && is_below(path)) {
        char there[PATH];
        pthread_mutex_lock(&lock);
        struct file *file = file_of(path);
        if (file) {
            file->count = 0;
            file->cut = -1;
        }
        shadow_path(path, there);
        REAL(unlink, there);
        pthread_mutex_unlock(&lock);
    }
    return done;
}
