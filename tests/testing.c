/* SPDX-License-Identifier: Apache-2.0 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "testing.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include <sebp/info.h>

#define GUARD_BYTES ((size_t)256)
#define GUARD_VALUE 0xA5
#define ALIGNMENT   ((size_t)64)
#define SKIPS_MOST  256
#define NAME_BYTES  64

/* Tests run in forked children: what they skip is counted in memory shared with the parent. */
typedef struct skips {
    int count;
    char names[SKIPS_MOST][NAME_BYTES];
} skips;

static skips *skipped;
static uint64_t random_state = 1;
static long rounds_percent = 100;
static sebp_gemm gemm_for_auto = SEBP_GEMM_AUTO;

/* What stands in front of a guarded buffer: where its block starts, how long the buffer is. */
typedef struct header {
    void *block;
    size_t bytes;
} header;

static int number_from_environment(const char *name, uint64_t *value)
{
    const char *text = getenv(name);
    if (text == NULL || *text == '\0') {
        return 0;
    }
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (errno != 0 || *end != '\0' || *text == '-') {
        fprintf(stderr, "%s=%s is not a number\n", name, text);
        exit(1);
    }
    return 1;
}

/* Whatever the library then falls back on would pass for oneDNN. */
static void gemm_from_environment(void)
{
    static const char name[] = "SEBP_TEST_GEMM";
    const char *text = getenv(name);
    if (text == NULL || *text == '\0') {
        return;
    }
    if (strcmp(text, "native") == 0) {
        gemm_for_auto = SEBP_GEMM_NATIVE;
    } else if (strcmp(text, "onednn") == 0) {
        gemm_for_auto = SEBP_GEMM_ONEDNN;
        sebp_info info = {.size_bytes = sizeof info};
        if (sebp_info_get(NULL, &info) != SEBP_SUCCESS || info.onednn[0] == '\0') {
            fprintf(stderr, "%s=%s, but the library was built without it\n", name, text);
            exit(1);
        }
        printf("%s=%s, oneDNN %s\n", name, text, info.onednn);
    } else {
        fprintf(stderr, "%s=%s is neither native nor onednn\n", name, text);
        exit(1);
    }
}

int testing_main(Suite *(*make_suite)(void))
{
    uint64_t seed = (uint64_t)time(NULL);
    number_from_environment("SEBP_TEST_SEED", &seed);
    random_state = seed;
    uint64_t percent = 100;
    number_from_environment("SEBP_TEST_ROUNDS", &percent);
    rounds_percent = (long)percent;
    unsetenv("SEBP_NUM_THREADS");
    unsetenv("SEBP_PLACEMENT");
    unsetenv("SEBP_GEMM");
    unsetenv("SEBP_PRECISION");
    unsetenv("SEBP_VERBOSE");
    gemm_from_environment();
    /* Check gives a test 4 seconds unless told otherwise, before the suite is made. */
    setenv("CK_DEFAULT_TIMEOUT", "120", 0);

    skipped =
        mmap(NULL, sizeof *skipped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (skipped == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    printf("SEBP_TEST_SEED=%" PRIu64 " SEBP_TEST_ROUNDS=%" PRIu64 "\n", seed, percent);
    fflush(stdout);

    SRunner *runner = srunner_create(make_suite());
    srunner_run_all(runner, CK_NORMAL);
    int run = srunner_ntests_run(runner);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);

    int skip_count = skipped->count;
    munmap(skipped, sizeof *skipped);
    printf("%d passed, %d failed, %d skipped\n", run - failed - skip_count, failed, skip_count);
    if (failed > 0 || run == 0) {
        return 1;
    }
    return skip_count == run ? 77 : 0;
}

void testing_skip(const char *name, const char *why)
{
    for (int i = 0; i < skipped->count; i++) {
        if (strcmp(skipped->names[i], name) == 0) {
            return;
        }
    }
    ck_assert_msg(skipped->count < SKIPS_MOST && strlen(name) < NAME_BYTES, "too many skips");
    strcpy(skipped->names[skipped->count++], name);
    printf("skipped: %s: %s\n", name, why);
    fflush(stdout);
}

int testing_rounds(int rounds)
{
    long scaled = rounds * rounds_percent / 100;
    return scaled < 1 ? 1 : (int)scaled;
}

bool testing_goes_on(int round, int rounds, int64_t looked, int64_t min)
{
    return round < testing_rounds(rounds) || (round < rounds && looked <= min);
}

int testing_environment(const char *name)
{
    const char *text = getenv(name);
    return text != NULL && *text != '\0';
}

/* splitmix64: every seed is a good one. */
uint64_t testing_random(void)
{
    random_state += UINT64_C(0x9E3779B97F4A7C15);
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

int64_t testing_between(int64_t low, int64_t high)
{
    return low + (int64_t)(testing_random() % (uint64_t)(high - low + 1));
}

double testing_uniform(void)
{
    return (double)(testing_random() >> 11) * 0x1p-52 - 1.0;
}

int testing_chance(double probability)
{
    return (double)(testing_random() >> 11) * 0x1p-53 < probability;
}

void *testing_alloc(size_t bytes, size_t offset)
{
    size_t front = sizeof(header) + GUARD_BYTES + ALIGNMENT;
    unsigned char *block = malloc(front + ALIGNMENT + offset + bytes + GUARD_BYTES);
    ck_assert_msg(block != NULL, "no memory for a test buffer of %zu bytes", bytes);
    uintptr_t start = ((uintptr_t)(block + front) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    unsigned char *data = block + (start - (uintptr_t)block) + offset;
    header head = {block, bytes};
    memcpy(data - GUARD_BYTES - sizeof head, &head, sizeof head);
    memset(data - GUARD_BYTES, GUARD_VALUE, GUARD_BYTES);
    memset(data, TESTING_POISON, bytes);
    memset(data + bytes, GUARD_VALUE, GUARD_BYTES);
    return data;
}

static header header_of(const void *data)
{
    header head;
    memcpy(&head, (const unsigned char *)data - GUARD_BYTES - sizeof head, sizeof head);
    return head;
}

/* Check writes to a file at each assertion that holds, so there are none in loops over elements. */
void testing_check(const void *data)
{
    const unsigned char *bytes = data;
    size_t size = header_of(data).bytes;
    for (size_t i = 0; i < GUARD_BYTES; i++) {
        if (bytes[size + i] != GUARD_VALUE) {
            ck_abort_msg("written %zu bytes past a buffer of %zu", i, size);
        }
        if (bytes[-1 - (ptrdiff_t)i] != GUARD_VALUE) {
            ck_abort_msg("written %zu bytes before a buffer of %zu", i + 1, size);
        }
    }
}

void testing_free(void *data)
{
    if (data != NULL) {
        testing_check(data);
        free(header_of(data).block);
    }
}

float testing_from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

uint16_t testing_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value)) {
        return (uint16_t)(bits >> 16 | 0x40);
    }
    /* A carry out of the mantissa goes into the exponent, up to Inf, as it should. */
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static size_t element_bytes(const sebp_matrix *matrix)
{
    return matrix->dtype == SEBP_BF16 ? sizeof(uint16_t) : sizeof(float);
}

/* The last row ends at its last element: what follows belongs to the guard band. */
static size_t matrix_bytes(const sebp_matrix *matrix)
{
    if (matrix->rows == 0) {
        return 0;
    }
    return (size_t)((matrix->rows - 1) * matrix->stride + matrix->cols) * element_bytes(matrix);
}

static unsigned char *row_bytes(const sebp_matrix *matrix, int64_t row)
{
    return (unsigned char *)matrix->data + (size_t)(row * matrix->stride) * element_bytes(matrix);
}

sebp_matrix testing_matrix(int64_t rows, int64_t cols, int64_t stride, sebp_dtype dtype)
{
    sebp_matrix matrix = {NULL, rows, cols, stride, dtype};
    size_t element = element_bytes(&matrix);
    matrix.data = testing_alloc(matrix_bytes(&matrix), element * (size_t)testing_between(0, 15));
    return matrix;
}

void testing_fill(const sebp_matrix *matrix, testing_values values)
{
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols; j++) {
            double value = testing_uniform();
            if (values == TESTING_INTEGER) {
                value = value < 0 ? floor(4 * value) : floor(4 * value) + 1;
            }
            testing_set(matrix, i, j, value);
        }
    }
}

void testing_poison(const sebp_matrix *matrix)
{
    memset(matrix->data, TESTING_POISON, matrix_bytes(matrix));
}

void testing_zero_rows(const sebp_matrix *matrix, double activity)
{
    for (int64_t i = 0; i < matrix->rows; i++) {
        if (!testing_chance(activity)) {
            memset(row_bytes(matrix, i), 0, (size_t)matrix->cols * element_bytes(matrix));
        }
    }
}

double testing_get(const sebp_matrix *matrix, int64_t row, int64_t col)
{
    if (matrix->dtype == SEBP_BF16) {
        return testing_from_bf16(((const uint16_t *)matrix->data)[row * matrix->stride + col]);
    }
    return ((const float *)matrix->data)[row * matrix->stride + col];
}

void testing_set(const sebp_matrix *matrix, int64_t row, int64_t col, double value)
{
    if (matrix->dtype == SEBP_BF16) {
        ((uint16_t *)matrix->data)[row * matrix->stride + col] = testing_to_bf16((float)value);
    } else {
        ((float *)matrix->data)[row * matrix->stride + col] = (float)value;
    }
}

double testing_at(const sebp_matrix *matrix, int64_t index)
{
    return testing_get(matrix, index / matrix->cols, index % matrix->cols);
}

sebp_matrix testing_copy(const sebp_matrix *matrix)
{
    sebp_matrix copy = testing_matrix(matrix->rows, matrix->cols, matrix->stride, matrix->dtype);
    memcpy(copy.data, matrix->data, matrix_bytes(matrix));
    return copy;
}

int testing_same_bits(const sebp_matrix *a, const sebp_matrix *b)
{
    ck_assert(a->rows == b->rows && a->cols == b->cols && a->dtype == b->dtype);
    size_t bytes = (size_t)a->cols * element_bytes(a);
    for (int64_t i = 0; i < a->rows; i++) {
        if (memcmp(row_bytes(a, i), row_bytes(b, i), bytes) != 0) {
            return 0;
        }
    }
    return 1;
}

int64_t testing_nonzeros(const sebp_matrix *matrix)
{
    int64_t count = 0;
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols; j++) {
            count += testing_get(matrix, i, j) != 0;
        }
    }
    return count;
}

void testing_check_matrix(const sebp_matrix *matrix)
{
    testing_check(matrix->data);
    size_t element = element_bytes(matrix);
    size_t gap = (size_t)(matrix->stride - matrix->cols) * element;
    for (int64_t i = 0; i + 1 < matrix->rows; i++) {
        const unsigned char *tail = row_bytes(matrix, i) + (size_t)matrix->cols * element;
        for (size_t j = 0; j < gap; j++) {
            if (tail[j] != TESTING_POISON) {
                ck_abort_msg("written into the gap after row %" PRId64, i);
            }
        }
    }
}

void testing_release(sebp_matrix *matrix)
{
    testing_check_matrix(matrix);
    testing_free(matrix->data);
    matrix->data = NULL;
}

sebp_dtype testing_dtype(void)
{
    return testing_chance(0.5) ? SEBP_F32 : SEBP_BF16;
}

int64_t testing_stride(int64_t cols)
{
    return cols + (testing_chance(0.5) ? 0 : testing_between(1, 19));
}

sebp_matrix testing_random_matrix(int64_t rows, int64_t cols, sebp_dtype dtype,
                                  testing_values values)
{
    sebp_matrix matrix = testing_matrix(rows, cols, testing_stride(cols), dtype);
    testing_fill(&matrix, values);
    return matrix;
}

sebp_sparse testing_sparse(int64_t k, int64_t rows, int64_t cols)
{
    return (sebp_sparse){testing_alloc((size_t)k * sizeof(int64_t), 0),
                         testing_alloc((size_t)k * sizeof(float), 0), k, rows, cols};
}

void testing_free_sparse(sebp_sparse *sparse)
{
    testing_free(sparse->indices);
    testing_free(sparse->values);
}

void *testing_zeros(int64_t count, size_t bytes)
{
    void *data = calloc(count > 0 ? (size_t)count : 1, bytes);
    ck_assert_ptr_nonnull(data);
    return data;
}

void testing_good_exit(pid_t child)
{
    int result = -1;
    ck_assert_int_eq(waitpid(child, &result, 0), child);
    ck_assert_msg(WIFEXITED(result), "the child was ended by signal %d", WTERMSIG(result));
    ck_assert_msg(WEXITSTATUS(result) == 0, "the child exited with %d", WEXITSTATUS(result));
}

sebp_gemm testing_gemm(sebp_gemm gemm)
{
    return gemm == SEBP_GEMM_AUTO ? gemm_for_auto : gemm;
}

int testing_has_gemm(sebp_gemm gemm, const char *test)
{
    sebp_info info = {.size_bytes = sizeof info};
    ck_assert_int_eq(sebp_info_get(NULL, &info), SEBP_SUCCESS);
    int has = gemm != SEBP_GEMM_ONEDNN || info.onednn[0] != '\0';
    if (!has) {
        char name[NAME_BYTES];
        snprintf(name, sizeof name, "%s with onednn", test);
        testing_skip(name, "built without it");
    }
    return has;
}

static void run_backwards(void *pool, int64_t tasks, sebp_task task, void *work)
{
    testing_host *host = pool;
    host->calls++;
    host->most_tasks = tasks > host->most_tasks ? tasks : host->most_tasks;
    for (int64_t i = tasks - 1; i >= 0; i--) {
        task(work, i);
    }
}

sebp_context *testing_hosted_context(sebp_gemm gemm, int threads, int64_t workspace,
                                     testing_host *host)
{
    char message[256] = "";
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = testing_gemm(gemm);
    options.threads = threads;
    options.workspace_bytes = workspace;
    options.parallel_for = host != NULL ? run_backwards : NULL;
    options.pool = host;
    options.message = message;
    options.message_bytes = sizeof message;
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(&options, &context);
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s", sebp_status_string(status), message);
    return context;
}

sebp_context *testing_context(sebp_gemm gemm, int threads, int64_t workspace)
{
    return testing_hosted_context(gemm, threads, workspace, NULL);
}

void testing_expect(sebp_status got, sebp_status want, const sebp_context *context)
{
    ck_assert_msg(got == want, "%s, not %s: %s", sebp_status_string(got), sebp_status_string(want),
                  sebp_context_message(context));
}

void testing_succeed(sebp_status status, const sebp_context *context)
{
    testing_expect(status, SEBP_SUCCESS, context);
}

void testing_refuse(sebp_status got, sebp_status want, const char *word,
                    const sebp_context *context)
{
    ck_assert_msg(got == want && strstr(sebp_context_message(context), word) != NULL,
                  "%s, not %s with \"%s\": %s", sebp_status_string(got), sebp_status_string(want),
                  word, sebp_context_message(context));
}
