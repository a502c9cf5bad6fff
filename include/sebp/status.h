/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file status.h
 * The status that a call returns, and the macros that every public declaration uses.
 */
#ifndef SEBP_STATUS_H
#define SEBP_STATUS_H

#ifdef __cplusplus
#define SEBP_BEGIN_DECLS extern "C" {
#define SEBP_END_DECLS   }
#else
#define SEBP_BEGIN_DECLS
#define SEBP_END_DECLS
#endif

#if defined(__GNUC__) || defined(__clang__)
#define SEBP_API __attribute__((visibility("default")))
#else
#define SEBP_API
#endif

SEBP_BEGIN_DECLS

/** The values are part of the ABI: new ones are added at the end. */
typedef enum sebp_status {
    SEBP_SUCCESS = 0,
    SEBP_ERROR_NULL = 1,     /**< a pointer that may not be NULL is NULL */
    SEBP_ERROR_SIZE = 2,     /**< a negative size; a struct whose size or tail is not known */
    SEBP_ERROR_DTYPE = 3,    /**< an unknown dtype, or dtypes that do not go together */
    SEBP_ERROR_STRIDE = 4,   /**< a stride smaller than the number of columns */
    SEBP_ERROR_OVERFLOW = 5, /**< sizes whose product does not fit in memory */
    SEBP_ERROR_SHAPE = 6,    /**< shapes that do not go together */
    SEBP_ERROR_ROWS =
        7, /**< indices out of range, unsorted or repeated; a set made for another M */
    SEBP_ERROR_VALUE = 8,        /**< an option or argument outside its range, NaN included */
    SEBP_ERROR_ALIAS = 9,        /**< an output overlaps an input or another output */
    SEBP_ERROR_MEMORY = 10,      /**< out of memory; or workspace_bytes is too small */
    SEBP_ERROR_UNSUPPORTED = 11, /**< this build or this machine lacks what was asked for */
    SEBP_ERROR_ENVIRONMENT = 12, /**< an environment variable holds a value it may not hold */
    SEBP_ERROR_BACKEND = 13,     /**< a library that is used (oneDNN, hwloc, LAPACK) failed */
    SEBP_ERROR_NONFINITE = 14,   /**< a NaN or Inf where there must be none */
    SEBP_ERROR_FILE = 15 /**< a file that cannot be read or written, or holds something else */
} sebp_status;

/**
 * One line that says what a status means: "shapes that do not go together".
 *
 * @param status  any value; an unknown one gives "unknown status".
 * @return a string that lives as long as the program. Never NULL.
 */
SEBP_API const char *sebp_status_string(sebp_status status);

SEBP_END_DECLS

#endif
