/* SPDX-License-Identifier: Apache-2.0 */
/* Files of bases: format, damage, paths, full disks, what is no file, many that save to one path. */
#include "config.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "bases.h"
#include "testing.h"

static char folder[64], path[96];
static sebp_context *context;
static sebp_basis *saved;
static unsigned char *file; /* as it was saved */
static size_t file_bytes;

static void write_file(const unsigned char *bytes, size_t count)
{
    FILE *stream = fopen(path, "wb");
    if (stream == NULL || fwrite(bytes, 1, count, stream) != count || fclose(stream) != 0) {
        ck_abort_msg("%s cannot be written", path);
    }
}

static void setup_file(void)
{
    strcpy(folder, "/tmp/test_basis_files.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/basis", folder);
    context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    sebp_matrix u_out = testing_random_matrix(3, 7, SEBP_F32, TESTING_REAL),
                u_in = testing_random_matrix(2, 5, SEBP_F32, TESTING_REAL);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &saved), SEBP_SUCCESS);
    testing_release(&u_out);
    testing_release(&u_in);
    testing_succeed(sebp_basis_save(context, saved, path), context);
    FILE *stream = fopen(path, "rb");
    ck_assert_ptr_nonnull(stream);
    file = malloc(4096);
    ck_assert_ptr_nonnull(file);
    file_bytes = fread(file, 1, 4096, stream);
    fclose(stream);
}

static void teardown_file(void)
{
    unlink(path);
    ck_assert_msg(rmdir(folder) == 0, "something was left in %s", folder);
    sebp_basis_destroy(saved);
    sebp_context_destroy(context);
    free(file);
}

static void refuses_file(const unsigned char *bytes, size_t count, sebp_status want,
                         const char *word, const char *what, size_t where)
{
    sebp_basis *basis = NULL;
    write_file(bytes, count);
    sebp_status got = sebp_basis_load(context, path, &basis);
    if (got != want || basis != NULL || strstr(sebp_context_message(context), word) == NULL) {
        ck_abort_msg("%s %zu: %s: %s", what, where, sebp_status_string(got),
                     sebp_context_message(context));
    }
}

/* zlib's, bit by bit. */
static uint32_t crc32_of(const unsigned char *bytes, size_t count)
{
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < count; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
        }
    }
    return ~crc;
}

static void seal(unsigned char *bytes)
{
    uint32_t crc = crc32_of(bytes, file_bytes - sizeof crc);
    memcpy(bytes + file_bytes - sizeof crc, &crc, sizeof crc);
}

START_TEST(file_as_described)
{
    int64_t sizes[4];
    uint32_t numbers[2], crc;
    const unsigned char *at = file + 64;
    ck_assert_uint_eq(file_bytes, 64 + 4 * (3 * 7 + 2 * 5) + 4);
    ck_assert_mem_eq(file, "SEBPBAS\x1A", 8);
    memcpy(numbers, file + 8, sizeof numbers);
    ck_assert(numbers[0] == 0x01020304 && numbers[1] == 1);
    memcpy(sizes, file + 16, sizeof sizes);
    ck_assert(sizes[0] == 7 && sizes[1] == 5 && sizes[2] == 3 && sizes[3] == 2);
    const sebp_matrix sides[] = {sebp_basis_out(saved), sebp_basis_in(saved)};
    for (int side = 0; side < 2; side++) {
        for (int64_t i = 0; i < sides[side].rows * sides[side].cols; i++, at += 4) {
            float value;
            memcpy(&value, at, sizeof value);
            ck_assert((double)value ==
                      testing_get(&sides[side], i / sides[side].cols, i % sides[side].cols));
        }
    }
    memcpy(&crc, at, sizeof crc);
    ck_assert_uint_eq(crc, crc32_of(file, file_bytes - 4));
    ck_assert_uint_eq(crc32_of((const unsigned char *)"123456789", 9), 0xCBF43926);
}
END_TEST

START_TEST(saved_and_loaded)
{
    sebp_basis *loaded = NULL;
    testing_succeed(sebp_basis_load(context, path, &loaded), context);
    bases_same(saved, loaded);
    sebp_basis_destroy(loaded);

    /* Shares, too; and over a file that is there. */
    const double shares[] = {0.75, 0.5};
    memcpy(file + 48, shares, sizeof shares);
    seal(file);
    write_file(file, file_bytes);
    testing_succeed(sebp_basis_load(context, path, &loaded), context);
    ck_assert(sebp_basis_share_out(loaded) == 0.75 && sebp_basis_share_in(loaded) == 0.5);
    testing_succeed(sebp_basis_save(context, saved, path), context);
    sebp_basis *again = NULL;
    testing_succeed(sebp_basis_load(context, path, &again), context);
    bases_same(again, saved);
    sebp_basis_destroy(again);
    sebp_basis_destroy(loaded);
}
END_TEST

START_TEST(damaged_files)
{
    for (size_t i = 0; i < file_bytes; i++) {
        for (int bit = 0; bit < 8; bit++) {
            file[i] ^= (unsigned char)(1 << bit);
            refuses_file(file, file_bytes, SEBP_ERROR_FILE, path, "byte", i);
            file[i] ^= (unsigned char)(1 << bit);
        }
    }
    for (size_t i = 0; i < file_bytes; i++) {
        refuses_file(file, i, SEBP_ERROR_FILE, i < 64 ? "too short" : "length", "cut at", i);
    }
    unsigned char *longer = calloc(1, file_bytes + 8);
    ck_assert_ptr_nonnull(longer);
    memcpy(longer, file, file_bytes);
    for (size_t i = 1; i <= 8; i++) {
        refuses_file(longer, file_bytes + i, SEBP_ERROR_FILE, "length", "longer by", i);
    }
    free(longer);
}
END_TEST

/* Files whose checksum is right. */
START_TEST(foreign_files)
{
    const unsigned char swapped[] = {file[11], file[10], file[9], file[8]};
    unsigned char *other = malloc(file_bytes);
    ck_assert_ptr_nonnull(other);
    const int64_t sizes[][4] = {{7, 5, 8, 2},  {7, 5, 3, 6},  {7, 5, 0, 2},
                                {7, 5, 3, -2}, {-7, 5, 3, 2}, {0, 0, 0, 0}};
    memcpy(other, file, file_bytes);
    memcpy(other + 8, swapped, 4);
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "another byte order", "byte order", 0);
    memcpy(other, file, file_bytes);
    other[12] ^= 3;
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "another version", "version", 0);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        memcpy(other, file, file_bytes);
        memcpy(other + 16, sizes[i], sizeof sizes[i]);
        seal(other);
        refuses_file(other, file_bytes, SEBP_ERROR_FILE, "sizes", "sizes", i);
    }
    /* Sizes so large that their bytes overflow, some to the right number. */
    const int64_t large[] = {INT64_MAX, INT64_MAX, (int64_t)1 << 62, (int64_t)1 << 62};
    memcpy(other, file, file_bytes);
    memcpy(other + 16, large, sizeof large);
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "length", "large", 0);
    for (size_t i = 0; i < 3; i++) { /* one vector, or as many of one element */
        const int64_t max = INT64_MAX - (int64_t)i * 15;
        const int64_t larger[][4] = {{max, max, 1, 1}, {max, 5, max, 2}, {max, 1, 1, 1}};
        for (size_t j = 0; j < 3; j++) {
            memcpy(other + 16, larger[j], sizeof larger[j]);
            seal(other);
            refuses_file(other, file_bytes, SEBP_ERROR_FILE, "length", "larger", 3 * i + j);
        }
    }
    memcpy(other, file, file_bytes);
    memcpy(other + 64 + 8, &(float){NAN}, sizeof(float));
    seal(other);
    refuses_file(other, file_bytes, SEBP_ERROR_NONFINITE, "NaN", "NaN", 0);
    memset(other, 'a', file_bytes);
    refuses_file(other, file_bytes, SEBP_ERROR_FILE, "not a basis", "text", 0);
    refuses_file(other, 0, SEBP_ERROR_FILE, "too short", "empty", 0);
    free(other);
}
END_TEST

START_TEST(no_file)
{
    sebp_basis *basis = NULL;
    char missing[160];
    snprintf(missing, sizeof missing, "%s/no/basis", folder);
    testing_refuse(sebp_basis_load(context, missing, &basis), SEBP_ERROR_FILE, missing, context);
    testing_refuse(sebp_basis_load(context, folder, &basis), SEBP_ERROR_FILE, folder, context);
    testing_refuse(sebp_basis_save(context, saved, missing), SEBP_ERROR_FILE, missing, context);
    testing_refuse(sebp_basis_save(context, saved, folder), SEBP_ERROR_FILE, "regular", context);
    testing_refuse(sebp_basis_load(context, NULL, &basis), SEBP_ERROR_NULL, "path", context);
    testing_refuse(sebp_basis_load(context, path, NULL), SEBP_ERROR_NULL, "basis", context);
    testing_refuse(sebp_basis_save(context, NULL, path), SEBP_ERROR_NULL, "basis", context);
    testing_refuse(sebp_basis_save(context, saved, NULL), SEBP_ERROR_NULL, "path", context);
    ck_assert_int_eq(sebp_basis_load(NULL, path, &basis), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_basis_save(NULL, saved, path), SEBP_ERROR_NULL);
    ck_assert_ptr_null(basis);
}
END_TEST

/* `message` is "function: path" and the reason, of a long path not all. */
static void check_line(const char *function, const char *of, const char *reason)
{
    const char *message = sebp_context_message(context);
    size_t start = strlen(function), end = strlen(message), last = strlen(reason);
    ck_assert_msg(end > start + last && strncmp(message, function, start) == 0 &&
                      strncmp(message + start, ": ", 2) == 0 &&
                      strcmp(message + end - last, reason) == 0,
                  "%s: %s", reason, message);
    ck_assert_msg(strncmp(message + start + 2, of, 20) == 0, "%s", message);
    ck_assert_msg(strncmp(message + end - last - 20, of + strlen(of) - 20, 20) == 0, "%s", message);
    ck_assert(strlen(of) < 240 || (end > 240 && strstr(message, "...") != NULL));
}

/* However long a path is, its ends and the reason are in the message. */
START_TEST(long_paths)
{
    enum { MOST = 5000 };
    sebp_basis *basis = NULL;
    char *name = malloc(MOST + 32), *reason = malloc(MOST);
    ck_assert(name != NULL && reason != NULL);
    for (int length = 100; length <= MOST; length += length < 300 ? 1 : 500) {
        int at = snprintf(name, MOST, "%s/no", folder);
        for (; at < length; at++) { /* no part of more than 255 bytes */
            name[at] = at % 100 == 0 ? '/' : (char)('a' + at % 26);
        }
        strcpy(name + at, "/the/end/of/the/path");
        const char *why = strerror(at < 4000 ? ENOENT : ENAMETOOLONG);
        snprintf(reason, MOST, ": %s", why);
        ck_assert_int_eq(sebp_basis_load(context, name, &basis), SEBP_ERROR_FILE);
        check_line("sebp_basis_load", name, reason);
        snprintf(reason, MOST, " cannot be written: %s", why);
        ck_assert_int_eq(sebp_basis_save(context, saved, name), SEBP_ERROR_FILE);
        check_line("sebp_basis_save", name, reason);
    }
    free(name);
    free(reason);
}
END_TEST

/* No character of UTF-8 is cut, and what would break a line is not in it. */
START_TEST(odd_paths)
{
    sebp_basis *basis = NULL;
    for (int skip = 0; skip < 8; skip++) {
        char name[900];
        int at = snprintf(name, sizeof name, "/no/%.*s", skip, "abcdefgh");
        for (; at < 800; at += 2) {
            memcpy(name + at, at % 200 < 2 ? "//" : "\xC3\xA9", 2);
        }
        name[at] = '\0';
        ck_assert_int_eq(sebp_basis_load(context, name, &basis), SEBP_ERROR_FILE);
        const char *message = sebp_context_message(context);
        for (size_t i = 0; message[i] != '\0'; i++) {
            int is_first = message[i] == '\xC3', is_second = message[i] == '\xA9';
            ck_assert(!is_first || message[i + 1] == '\xA9');
            ck_assert(!is_second || (i > 0 && message[i - 1] == '\xC3'));
        }
        ck_assert_ptr_nonnull(strstr(message, strerror(ENOENT)));
    }
    ck_assert_int_eq(sebp_basis_load(context, "/no/a\nb\tc\x1b[1m\x7f", &basis), SEBP_ERROR_FILE);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "/no/a?b?c?[1m?: "));
}
END_TEST

/* What the path holds is what was saved. */
static void still_there(void)
{
    sebp_basis *loaded = NULL;
    testing_succeed(sebp_basis_load(context, path, &loaded), context);
    bases_same(loaded, saved);
    sebp_basis_destroy(loaded);
}

/* A file that grows over a limit, as on a disk that is full: nothing is lost, nothing is left. */
START_TEST(full_disk)
{
    struct rlimit before, limit;
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = before;
    limit.rlim_cur = 100;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    fflush(NULL);
    /* Check writes to files, too: nothing is asserted meanwhile. */
    int limited = setrlimit(RLIMIT_FSIZE, &limit);
    sebp_status status = sebp_basis_save(context, saved, path);
    int unlimited = setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    ck_assert(limited == 0 && unlimited == 0);
    testing_refuse(status, SEBP_ERROR_FILE, "large", context);
    still_there();
}
END_TEST

/* A folder that may be read alone. For root there is none: it becomes somebody else. */
START_TEST(unwritable_folder)
{
    const uid_t root = 0, nobody = 65534;
    ck_assert_int_eq(chmod(path, 0644), 0);
    ck_assert_int_eq(chmod(folder, 0555), 0);
    if (geteuid() == root && seteuid(nobody) != 0) {
        testing_skip("unwritable_folder", "nothing is unwritable for root");
    } else {
        sebp_status status = sebp_basis_save(context, saved, path);
        testing_refuse(status, SEBP_ERROR_FILE, "denied", context);
        still_there();
    }
    ck_assert(getuid() != root || seteuid(root) == 0);
    ck_assert_int_eq(chmod(folder, 0755), 0);
}
END_TEST

/* As what is no file, and at once: a pipe would be waited for. */
static void refuses_to_load(const char *name)
{
    sebp_basis *basis = NULL;
    alarm(20);
    sebp_status status = sebp_basis_load(context, name, &basis);
    alarm(0);
    testing_refuse(status, SEBP_ERROR_FILE, "not a regular file", context);
    ck_assert_ptr_null(basis);
}

/* What is no file is refused and stays, where a file moved there would have taken its place. */
START_TEST(no_regular_file)
{
    char pipe[160], link[160];
    struct stat is;
    snprintf(pipe, sizeof pipe, "%s/pipe", folder);
    ck_assert_int_eq(mkfifo(pipe, 0600), 0);
    testing_refuse(sebp_basis_save(context, saved, pipe), SEBP_ERROR_FILE, "regular", context);
    refuses_to_load(pipe);
    ck_assert(lstat(pipe, &is) == 0 && S_ISFIFO(is.st_mode));
    refuses_to_load(folder);
    refuses_to_load("/dev/null");
    refuses_to_load("/dev/zero");

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/socket", folder);
    int descriptor = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_ge(descriptor, 0);
    ck_assert_int_eq(bind(descriptor, (const struct sockaddr *)&address, sizeof address), 0);
    testing_refuse(sebp_basis_save(context, saved, address.sun_path), SEBP_ERROR_FILE, "regular",
                   context);
    refuses_to_load(address.sun_path);
    ck_assert(lstat(address.sun_path, &is) == 0 && S_ISSOCK(is.st_mode));
    close(descriptor);

    /* A link is replaced, whatever it leads to; that stays. */
    const char *const targets[] = {pipe, path, "nowhere"};
    for (int i = 0; i < 3; i++) {
        sebp_basis *loaded = NULL;
        snprintf(link, sizeof link, "%s/link", folder);
        ck_assert_int_eq(symlink(targets[i], link), 0);
        if (i == 0) {
            refuses_to_load(link);
        }
        testing_succeed(sebp_basis_save(context, saved, link), context);
        ck_assert(lstat(link, &is) == 0 && S_ISREG(is.st_mode));
        testing_succeed(sebp_basis_load(context, link, &loaded), context);
        bases_same(loaded, saved);
        sebp_basis_destroy(loaded);
        ck_assert_int_eq(unlink(link), 0);
    }
    ck_assert(lstat(pipe, &is) == 0 && S_ISFIFO(is.st_mode));
    ck_assert_int_eq(unlink(pipe), 0);
    ck_assert_int_eq(unlink(address.sun_path), 0);
}
END_TEST

/* The mode of any new file. */
START_TEST(mode_of_a_file)
{
    const mode_t masks[] = {022, 027, 077, 0};
    for (int i = 0; i < 4; i++) {
        struct stat is;
        mode_t before = umask(masks[i]);
        sebp_status status = sebp_basis_save(context, saved, path);
        umask(before);
        testing_succeed(status, context);
        ck_assert_int_eq(stat(path, &is), 0);
        ck_assert_uint_eq(is.st_mode & 0777, 0666 & ~masks[i]);
    }
}
END_TEST

/* Processes that save to one path: whoever reads meanwhile finds a whole file of one of them, and
 * they leave that alone. What is left of one that was killed is in nobody's way. */
START_TEST(many_save_to_one_path)
{
    enum { SAVERS = 4, TIMES = 60 };
    sebp_basis *bases[SAVERS];
    pid_t children[SAVERS];
    char stale[160];
    for (int i = 0; i < SAVERS; i++) { /* of different sizes, so of different lengths */
        sebp_matrix u_out = testing_random_matrix(3 + i, 7 + 50 * i, SEBP_F32, TESTING_REAL);
        sebp_matrix u_in = testing_random_matrix(2, 5, SEBP_F32, TESTING_REAL);
        ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &bases[i]), SEBP_SUCCESS);
        testing_release(&u_out);
        testing_release(&u_in);
    }
    snprintf(stale, sizeof stale, "%s.new-%ld-0", path, (long)getpid());
    FILE *stream = fopen(stale, "wb");
    ck_assert(stream != NULL && fclose(stream) == 0);
    testing_succeed(sebp_basis_save(context, bases[0], path), context);
    fflush(NULL);
    for (int i = 0; i < SAVERS; i++) {
        children[i] = fork();
        ck_assert_int_ge(children[i], 0);
        for (int times = 0; children[i] == 0 && times < TIMES; times++) {
            if (sebp_basis_save(context, bases[i], path) != SEBP_SUCCESS) {
                _exit(1);
            }
        }
        if (children[i] == 0) {
            _exit(0);
        }
    }
    int ended = 0, good = 0;
    for (int last = 0; !last;) {
        int result;
        last = ended == SAVERS; /* once more when all are done */
        while (ended < SAVERS && waitpid(-1, &result, WNOHANG) > 0) {
            good += WIFEXITED(result) && WEXITSTATUS(result) == 0;
            ended++;
        }
        sebp_basis *loaded = NULL;
        testing_succeed(sebp_basis_load(context, path, &loaded), context);
        int64_t whose = sebp_basis_out(loaded).rows - 3;
        ck_assert(whose >= 0 && whose < SAVERS);
        bases_same(loaded, bases[whose]);
        sebp_basis_destroy(loaded);
    }
    ck_assert_int_eq(good, SAVERS);
    for (int i = 0; i < SAVERS; i++) {
        sebp_basis_destroy(bases[i]);
    }
    ck_assert_int_eq(unlink(stale), 0); /* that the folder is empty is seen when it is removed */
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("basis files");
    TCase *files = tcase_create("basis files");
    tcase_add_checked_fixture(files, setup_file, teardown_file);
    tcase_add_test(files, file_as_described);
    tcase_add_test(files, saved_and_loaded);
    tcase_add_test(files, damaged_files);
    tcase_add_test(files, foreign_files);
    tcase_add_test(files, no_file);
    tcase_add_test(files, long_paths);
    tcase_add_test(files, odd_paths);
    tcase_add_test(files, full_disk);
    tcase_add_test(files, unwritable_folder);
    tcase_add_test(files, no_regular_file);
    tcase_add_test(files, mode_of_a_file);
    tcase_add_test(files, many_save_to_one_path);
    suite_add_tcase(suite, files);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
