/* file.c - temporary name, sync, rename. */
#include "formats/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

Status file_read(char **bytes, size_t *size, const char *path, size_t limit) {
    Status status = OK;
    char *buffer = NULL;
    struct stat info;
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fileno(file), &info)) FAIL_DONE(ERR_IO, "%s: %s", path, strerror(errno));
    if (S_ISDIR(info.st_mode)) FAIL_DONE(ERR_IO, "%s: is a folder, expected a file", path);
    size_t used = 0, space = S_ISREG(info.st_mode) ? (size_t)info.st_size + 1 : 65536;
    buffer = malloc(space + 1);
    while (buffer) {
        used += fread(buffer + used, 1, space - used, file);
        if (used < space) break;
        char *larger = realloc(buffer, (space *= 2) + 1);
        if (!larger) free(buffer);
        buffer = larger;
    }
    if (!buffer) FAIL_DONE(ERR_IO, "%s: out of memory for %zu bytes", path, space);
    if (ferror(file)) FAIL_DONE(ERR_IO, "%s: cannot be read", path);
    if (used > limit)
        FAIL_DONE(ERR_FORMAT, "%s: %zu bytes, expected at most %zu", path, used, limit);
    buffer[used] = 0;
    *size = used;
    *bytes = buffer;
done:
    if (status != OK) free(buffer);
    fclose(file);
    return status;
}

Status file_map(uint8_t **out, size_t *size, const char *path) {
    Status status = OK;
    struct stat info;
    int fd = open(path, O_RDONLY);
    if (fd < 0) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &info)) FAIL_DONE(ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) FAIL_DONE(ERR_IO, "%s: is not a file", path);
    if (info.st_size < 8)
        FAIL_DONE(ERR_FORMAT, "%s: %zu bytes is too short for a header", path,
                  (size_t)info.st_size);
    void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) FAIL_DONE(ERR_IO, "%s: cannot be mapped: %s", path, strerror(errno));
    *out = map;
    *size = (size_t)info.st_size;
done:
    close(fd);
    return status;
}

bool file_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

char *path_join(const char *dir, const char *name) {
    size_t length = strlen(dir);
    return must_format("%s%s%s", dir, length && dir[length - 1] == '/' ? "" : "/", name);
}

char *path_folder(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? must_format("%.*s", slash == path ? 1 : (int)(slash - path), path)
                 : must_strdup(".");
}

Status file_writer_open(FileWriter *w, const char *path) {
    *w = (FileWriter){.path = must_strdup(path),
                      .temporary = must_format("%s.tmp%d", path, (int)getpid())};
    w->stream = fopen(w->temporary, "wb");
    if (w->stream) return OK;
    status_fail(ERR_IO, "%s: cannot be written: %s", path, strerror(errno));
    file_writer_abandon(w);
    return ERR_IO;
}

static volatile sig_atomic_t stop_requested;

static void request_stop(int signal) {
    (void)signal;
    stop_requested = 1;
}

void file_stop_on_signals(void) {
    struct sigaction action = {.sa_handler = request_stop};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool file_stopping(void) {
    return stop_requested;
}

Status file_writer_write(FileWriter *w, const void *bytes, size_t size) {
    if (stop_requested) FAIL(ERR_STOPPED, "%s: stopped, nothing is left behind", w->path);
    if (fwrite(bytes, 1, size, w->stream) != size)
        FAIL(ERR_IO, "%s: cannot be written: %s", w->path, strerror(errno));
    return OK;
}

/* Makes a rename lasting. */
static void sync_folder_of(const char *path) {
    char *dir = must_strdup(path), *slash = strrchr(dir, '/');
    if (slash) slash[slash == dir ? 1 : 0] = 0;
    int fd = open(slash ? dir : ".", O_RDONLY | O_DIRECTORY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(dir);
}

Status file_writer_commit(FileWriter *w) {
    Status status = OK;
    bool failed = fflush(w->stream) || fsync(fileno(w->stream));
    int saved = errno;
    if (fclose(w->stream) && !failed) failed = true, saved = errno;
    w->stream = NULL;
    if (failed) FAIL_DONE(ERR_IO, "%s: cannot be written: %s", w->path, strerror(saved));
    if (rename(w->temporary, w->path))
        FAIL_DONE(ERR_IO, "%s: cannot be put in place: %s", w->path, strerror(errno));
    sync_folder_of(w->path);
    free(w->temporary);
    w->temporary = NULL;
done:
    file_writer_abandon(w);
    return status;
}

void file_writer_abandon(FileWriter *w) {
    if (w->stream) fclose(w->stream);
    if (w->temporary) unlink(w->temporary);
    free(w->temporary);
    free(w->path);
    *w = (FileWriter){0};
}

Status file_write(const char *path, const void *bytes, size_t size) {
    FileWriter w;
    TRY(file_writer_open(&w, path));
    Status status = file_writer_write(&w, bytes, size);
    if (status == OK) return file_writer_commit(&w);
    file_writer_abandon(&w);
    return status;
}

Status file_copy(const char *from, const char *to, bool optional) {
    if (optional && !file_exists(from)) return OK;
    char *bytes;
    size_t size;
    TRY(file_read(&bytes, &size, from, (size_t)1 << 32));
    Status status = file_write(to, bytes, size);
    free(bytes);
    return status;
}

Status folder_make(const char *path) {
    char *copy = must_strdup(path);
    for (char *p = copy + 1;; p++) {
        if (*p && *p != '/') continue;
        char keep = *p;
        *p = 0;
        struct stat info;
        bool failed =
            mkdir(copy, 0777) && (errno != EEXIST || stat(copy, &info) || !S_ISDIR(info.st_mode));
        if (failed) {
            status_fail(ERR_IO, "%s: cannot make the folder: %s", copy, strerror(errno));
            free(copy);
            return ERR_IO;
        }
        *p = keep;
        if (!keep) break;
    }
    free(copy);
    return OK;
}

Status folder_begin(char **temporary, const char *path) {
    char *name = must_format("%s.tmp%d", path, (int)getpid());
    tree_remove(name);
    Status status = folder_make(name);
    if (status != OK) {
        free(name);
        return status;
    }
    *temporary = name;
    return OK;
}

Status folder_commit(char *temporary, const char *path) {
    Status status = OK;
    sync_folder_of(path);
    if (rename(temporary,
               path)) { /* something is there: exchange the two, then remove what it was */
        if (errno != ENOTEMPTY && errno != EEXIST && errno != ENOTDIR)
            FAIL_DONE(ERR_IO, "%s: cannot be put in place: %s", path, strerror(errno));
        if (renameat2(AT_FDCWD, temporary, AT_FDCWD, path, RENAME_EXCHANGE)) {
            char *old = must_format("%s.old%d", path, (int)getpid());
            bool moved = !rename(path, old) && !rename(temporary, path);
            int saved = errno;
            tree_remove(old);
            free(old);
            if (!moved) FAIL_DONE(ERR_IO, "%s: cannot be put in place: %s", path, strerror(saved));
        }
        tree_remove(temporary);
    }
    sync_folder_of(path);
    free(temporary);
    return OK;
done:
    folder_abandon(temporary);
    return status;
}

void folder_abandon(char *temporary) {
    if (!temporary) return;
    tree_remove(temporary);
    free(temporary);
}

void tree_remove(const char *path) {
    DIR *dir = opendir(path);
    if (!dir) {
        unlink(path);
        return;
    }
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        char *inner = path_join(path, entry->d_name);
        struct stat info;
        if (!lstat(inner, &info) && S_ISDIR(info.st_mode))
            tree_remove(inner);
        else
            unlink(inner);
        free(inner);
    }
    closedir(dir);
    rmdir(path);
}
