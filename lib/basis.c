/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file basis.c
 * Bases: made from vectors, looked at, saved and loaded.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "basis.h"
#include "call.h"

enum { LINE = 16 }; /* floats in a cache line */

/* ---- making and looking ---- */

/* Allocates rows x cols floats. The rows lie an odd number of cache lines apart: rows a multiple of
 * 4 KiB apart would compete for the same few places of a cache. */
static sebp_status make_vectors(int64_t rows, int64_t cols, sebp_matrix *vectors)
{
    int64_t stride, bytes;
    if (__builtin_add_overflow(cols, 2 * LINE, &stride))
        return SEBP_ERROR_OVERFLOW;
    stride = (stride - 1) / (2 * LINE) * (2 * LINE) + LINE;
    if (__builtin_mul_overflow(rows, stride, &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)sizeof(float), &bytes)) {
        return SEBP_ERROR_OVERFLOW;
    }
    *vectors = (sebp_matrix){calloc(1, (size_t)bytes), rows, cols, stride, SEBP_F32};
    return vectors->data != NULL ? SEBP_SUCCESS : SEBP_ERROR_MEMORY;
}

sebp_status sebp_basis_make(int64_t rank_out, int64_t out_features, int64_t rank_in,
                            int64_t in_features, sebp_basis **basis)
{
    sebp_basis *made = calloc(1, sizeof *made);
    if (made == NULL)
        return SEBP_ERROR_MEMORY;
    made->out_copies = sebp_copies_make();
    made->in_copies = sebp_copies_make();
    sebp_status status = made->out_copies != NULL && made->in_copies != NULL
                             ? make_vectors(rank_out, out_features, &made->out)
                             : SEBP_ERROR_MEMORY;
    if (status == SEBP_SUCCESS)
        status = make_vectors(rank_in, in_features, &made->in);
    if (status != SEBP_SUCCESS) {
        sebp_basis_destroy(made);
        return status;
    }
    made->share_out = made->share_in = NAN;
    *basis = made;
    return SEBP_SUCCESS;
}

static float *row_of(const sebp_matrix *vectors, int64_t i)
{
    return (float *)vectors->data + i * vectors->stride;
}

bool sebp_basis_all_finite(const sebp_matrix *vectors)
{
    for (int64_t i = 0; i < vectors->rows; i++) {
        const float *row = row_of(vectors, i);
        for (int64_t j = 0; j < vectors->cols; j++) {
            if (!isfinite(row[j]))
                return false;
        }
    }
    return true;
}

sebp_status sebp_basis_from_vectors(const sebp_matrix *u_out, const sebp_matrix *u_in,
                                    sebp_basis **basis)
{
    const sebp_matrix *both[] = {u_out, u_in};
    if (u_out == NULL || u_in == NULL || basis == NULL)
        return SEBP_ERROR_NULL;
    for (int i = 0; i < 2; i++) {
        sebp_status status = sebp_matrix_check(both[i]);
        if (status != SEBP_SUCCESS)
            return status;
        if (both[i]->rows == 0)
            return SEBP_ERROR_SIZE;
        if (both[i]->dtype != SEBP_F32)
            return SEBP_ERROR_DTYPE;
    }
    for (int i = 0; i < 2; i++) {
        if (both[i]->rows > both[i]->cols)
            return SEBP_ERROR_SHAPE;
    }
    if (!sebp_basis_all_finite(u_out) || !sebp_basis_all_finite(u_in))
        return SEBP_ERROR_NONFINITE;
    sebp_basis *made;
    sebp_status status = sebp_basis_make(u_out->rows, u_out->cols, u_in->rows, u_in->cols, &made);
    if (status != SEBP_SUCCESS)
        return status;
    sebp_matrix_convert(u_out, &made->out);
    sebp_matrix_convert(u_in, &made->in);
    *basis = made;
    return SEBP_SUCCESS;
}

void sebp_basis_destroy(sebp_basis *basis)
{
    if (basis != NULL) {
        sebp_copies_destroy(basis->out_copies);
        sebp_copies_destroy(basis->in_copies);
        free(basis->out.data);
        free(basis->in.data);
        free(basis);
    }
}

static void side_on_device(sebp_call *call, sebp_copies *copies, const sebp_matrix *side,
                           sebp_matrix *copy)
{
    const void *data = NULL;
    *copy = *side;
    if (!sebp_call_goes_on(call))
        return;
    sebp_status status = sebp_copies_get(copies, call->context->device, side->data,
                                         side->rows * side->stride * (int64_t)sizeof(float), &data);
    sebp_call_keep(call, status, "copying the basis to the device");
    *copy = sebp_input_view(data, side->rows, side->cols, side->stride, side->dtype);
}

void sebp_basis_on_device(sebp_call *call, const sebp_basis *basis, sebp_matrix *out,
                          sebp_matrix *in)
{
    side_on_device(call, basis->out_copies, &basis->out, out);
    side_on_device(call, basis->in_copies, &basis->in, in);
}

sebp_matrix sebp_basis_out(const sebp_basis *basis)
{
    return basis != NULL ? basis->out : sebp_matrix_f32(NULL, 0, 0);
}

sebp_matrix sebp_basis_in(const sebp_basis *basis)
{
    return basis != NULL ? basis->in : sebp_matrix_f32(NULL, 0, 0);
}

double sebp_basis_share_out(const sebp_basis *basis)
{
    return basis != NULL ? basis->share_out : NAN;
}

double sebp_basis_share_in(const sebp_basis *basis)
{
    return basis != NULL ? basis->share_in : NAN;
}

/* ---- files ---- */

/* What a file begins with, as basis.h describes it: 64 bytes without gaps. */
typedef struct file_header {
    char magic[8];
    uint32_t byte_order;
    uint32_t version;
    int64_t out_features, in_features, rank_out, rank_in;
    double share_out, share_in;
} file_header;

_Static_assert(sizeof(file_header) == 64, "the header of a basis file has gaps");

static const char MAGIC[8] = {'S', 'E', 'B', 'P', 'B', 'A', 'S', 0x1A};
static const uint32_t BYTE_ORDER_MARK = 0x01020304, FOREIGN_MARK = 0x04030201, FORMAT_VERSION = 1;

/* A file being read or written, and the CRC-32 of what has gone by. */
typedef struct checked_file {
    FILE *file;
    uint32_t crc;
    uint32_t table[256];
} checked_file;

static void begin_stream(checked_file *stream, FILE *file)
{
    stream->file = file;
    stream->crc = 0xFFFFFFFF;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xEDB88320 : 0);
        stream->table[i] = value;
    }
}

static void add_to_crc(checked_file *stream, const void *data, size_t bytes)
{
    const unsigned char *at = data;
    uint32_t crc = stream->crc;
    for (size_t i = 0; i < bytes; i++)
        crc = crc >> 8 ^ stream->table[(crc ^ at[i]) & 0xFF];
    stream->crc = crc;
}

static bool write_bytes(checked_file *stream, const void *data, size_t bytes)
{
    add_to_crc(stream, data, bytes);
    return fwrite(data, 1, bytes, stream->file) == bytes;
}

static bool read_bytes(checked_file *stream, void *data, size_t bytes)
{
    if (fread(data, 1, bytes, stream->file) != bytes)
        return false;
    add_to_crc(stream, data, bytes);
    return true;
}

static bool write_vectors(checked_file *stream, const sebp_matrix *vectors)
{
    bool done = true;
    for (int64_t i = 0; i < vectors->rows && done; i++)
        done = write_bytes(stream, row_of(vectors, i), (size_t)vectors->cols * sizeof(float));
    return done;
}

static bool read_vectors(checked_file *stream, const sebp_matrix *vectors)
{
    bool done = true;
    for (int64_t i = 0; i < vectors->rows && done; i++)
        done = read_bytes(stream, row_of(vectors, i), (size_t)vectors->cols * sizeof(float));
    return done;
}

static bool write_basis(FILE *file, const sebp_basis *basis)
{
    file_header header = {.byte_order = BYTE_ORDER_MARK,
                          .version = FORMAT_VERSION,
                          .out_features = basis->out.cols,
                          .in_features = basis->in.cols,
                          .rank_out = basis->out.rows,
                          .rank_in = basis->in.rows,
                          .share_out = basis->share_out,
                          .share_in = basis->share_in};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    checked_file stream;
    begin_stream(&stream, file);
    if (!write_bytes(&stream, &header, sizeof header) || !write_vectors(&stream, &basis->out) ||
        !write_vectors(&stream, &basis->in)) {
        return false;
    }
    uint32_t crc = ~stream.crc;
    return write_bytes(&stream, &crc, sizeof crc);
}

/* Opens a new file beside `path`, under a name that nobody else uses, and puts that name into
 * *name. The file has the mode that fopen() gives; mkstemp() would give another. On failure it
 * returns NULL, *name is NULL, and errno says why. */
static FILE *open_beside(const char *path, char **name)
{
    enum { SUFFIX = 64, TRIES = 10000 };
    size_t room = strlen(path) + SUFFIX;
    int descriptor = -1;
    FILE *file = NULL;
    *name = malloc(room);
    if (*name == NULL) {
        errno = ENOMEM;
        return NULL;
    }
    for (int i = 0; i < TRIES; i++) {
        snprintf(*name, room, "%s.new-%ld-%d", path, (long)getpid(), i);
        descriptor = open(*name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (descriptor >= 0 || errno != EEXIST)
            break;
    }
    if (descriptor >= 0)
        file = fdopen(descriptor, "wb");
    if (file == NULL) {
        int reason = errno;
        if (descriptor >= 0) {
            close(descriptor);
            unlink(*name);
        }
        free(*name);
        *name = NULL;
        errno = reason;
    }
    return file;
}

/* Whether a new file may take the name `path`: nothing has it, or a regular file, or a link to one.
 * Otherwise the new file would replace a device or a pipe. */
static bool may_replace(const char *path)
{
    struct stat is;
    return lstat(path, &is) != 0 || S_ISREG(is.st_mode) || S_ISLNK(is.st_mode);
}

sebp_status sebp_basis_save(sebp_context *context, const sebp_basis *basis, const char *path)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_basis_save");
    if (!sebp_require(&call, "basis", basis) || !sebp_require(&call, "path", path))
        return call.status;
    if (!may_replace(path)) {
        return sebp_fail_about(context, SEBP_ERROR_FILE, call.function, path,
                               " is not a regular file");
    }
    char *beside;
    FILE *file = open_beside(path, &beside);
    bool done = false;
    int reason = errno;
    if (file != NULL) {
        /* The file is on the disk before it gets its name: after a crash the name never stands for
         * a part of it. */
        done = write_basis(file, basis) && fflush(file) == 0 && fsync(fileno(file)) == 0;
        reason = errno;
        if (fclose(file) != 0 && done) {
            done = false;
            reason = errno;
        }
        if (done && rename(beside, path) != 0) {
            done = false;
            reason = errno;
        }
        if (!done)
            unlink(beside);
    }
    free(beside);
    if (done)
        return SEBP_SUCCESS;
    return sebp_fail_about(context, reason == ENOMEM ? SEBP_ERROR_MEMORY : SEBP_ERROR_FILE,
                           call.function, path, " cannot be written: %s", strerror(reason));
}

/* Says why a header is refused; NULL: it is good. `length` is that of the file. */
static const char *refuse_header(const file_header *header, int64_t length)
{
    int64_t out, in, bytes;
    if (memcmp(header->magic, MAGIC, sizeof MAGIC) != 0)
        return "it is not a basis";
    if (header->byte_order == FOREIGN_MARK)
        return "it was written by a machine of another byte order";
    if (header->byte_order != BYTE_ORDER_MARK)
        return "its mark of byte order is damaged";
    if (header->version != FORMAT_VERSION)
        return "it is of another version";
    if (header->rank_out < 1 || header->rank_out > header->out_features || header->rank_in < 1 ||
        header->rank_in > header->in_features) {
        return "its sizes are not those of a basis";
    }
    if (__builtin_mul_overflow(header->rank_out, header->out_features, &out) ||
        __builtin_mul_overflow(header->rank_in, header->in_features, &in) ||
        __builtin_add_overflow(out, in, &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)sizeof(float), &bytes) ||
        __builtin_add_overflow(bytes, (int64_t)(sizeof *header + sizeof(uint32_t)), &bytes) ||
        bytes != length) {
        return "it has another length than its sizes say";
    }
    return NULL;
}

/* Reads a file. Where that fails for another reason than memory, *reason says what is wrong with
 * it. */
static sebp_status read_basis(FILE *file, sebp_basis **basis, const char **reason)
{
    file_header header;
    checked_file stream;
    *reason = NULL;
    begin_stream(&stream, file);
    if (!read_bytes(&stream, &header, sizeof header))
        *reason = ferror(file) ? strerror(errno) : "it is too short for a basis";
    else if (fseeko(file, 0, SEEK_END) != 0)
        *reason = strerror(errno);
    else
        *reason = refuse_header(&header, ftello(file));
    if (*reason == NULL && fseeko(file, sizeof header, SEEK_SET) != 0)
        *reason = strerror(errno);
    if (*reason != NULL)
        return SEBP_ERROR_FILE;

    sebp_basis *made;
    sebp_status status = sebp_basis_make(header.rank_out, header.out_features, header.rank_in,
                                         header.in_features, &made);
    if (status != SEBP_SUCCESS)
        return status;
    made->share_out = header.share_out;
    made->share_in = header.share_in;
    uint32_t wanted = 0, crc = 0;
    bool done = read_vectors(&stream, &made->out) && read_vectors(&stream, &made->in);
    wanted = ~stream.crc;
    if (!done || !read_bytes(&stream, &crc, sizeof crc)) {
        *reason = ferror(file) ? strerror(errno) : "it has become shorter";
        status = SEBP_ERROR_FILE;
    } else if (crc != wanted) {
        *reason = "its checksum does not match";
        status = SEBP_ERROR_FILE;
    } else if (!sebp_basis_all_finite(&made->out) || !sebp_basis_all_finite(&made->in)) {
        *reason = "it holds a NaN or Inf";
        status = SEBP_ERROR_NONFINITE;
    }
    if (status != SEBP_SUCCESS)
        sebp_basis_destroy(made);
    else
        *basis = made;
    return status;
}

/* Opens a file to read it. What is not a regular file is refused before it is opened: opening a
 * pipe waits for a writer, and opening a device can have effects. If something else takes the place
 * of the file in between, opening it does not wait. On failure it returns NULL and *reason says
 * why; errno is 0 if it is not the cause. */
static FILE *open_regular(const char *path, const char **reason)
{
    static const char is_none[] = "it is not a regular file";
    struct stat is;
    FILE *file = NULL;
    int descriptor = -1;
    *reason = NULL;
    if (stat(path, &is) == 0) {
        *reason = S_ISREG(is.st_mode) ? NULL : is_none;
        if (*reason == NULL)
            descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    }
    if (descriptor >= 0 && fstat(descriptor, &is) == 0) {
        *reason = S_ISREG(is.st_mode) ? NULL : is_none;
        if (*reason == NULL)
            file = fdopen(descriptor, "rb");
    }
    int error = file != NULL || *reason != NULL ? 0 : errno;
    if (file == NULL && descriptor >= 0)
        close(descriptor);
    if (error != 0)
        *reason = strerror(error);
    errno = error;
    return file;
}

sebp_status sebp_basis_load(sebp_context *context, const char *path, sebp_basis **basis)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_basis_load");
    if (!sebp_require(&call, "path", path) || !sebp_require(&call, "basis", basis))
        return call.status;
    const char *reason;
    FILE *file = open_regular(path, &reason);
    sebp_status status = errno == ENOMEM ? SEBP_ERROR_MEMORY : SEBP_ERROR_FILE;
    if (file != NULL) {
        status = read_basis(file, basis, &reason);
        fclose(file);
    }
    if (status == SEBP_SUCCESS)
        return SEBP_SUCCESS;
    return sebp_fail_about(context, status, call.function, path, ": %s",
                           reason != NULL ? reason : sebp_status_string(status));
}
