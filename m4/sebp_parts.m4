dnl SPDX-License-Identifier: Apache-2.0

# Parts that a build may have or not. Each is used where it is found; asked for by --with-PART and
# not found, it is an error; --without-PART refuses it. Each macro sets sebp_have_PART to yes or no
# and sebp_PART_summary to words for the end of configure.

# SEBP_PART(PART, NAME, FIND, [prefix])
# -------------------------------------
# FIND is run unless the part is refused. It sets sebp_have_PART=yes where it finds the part, and
# else sebp_PART_summary to the reason. --with-PART takes a PREFIX where the fourth argument is
# given; what it cannot take is an error.
AC_DEFUN([SEBP_PART],
[sebp_have_$1=no
sebp_$1_summary="no: not found"
AS_CASE([$with_$1], [yes|no|check], [],
  m4_ifval([$4],
    [[/*], [],
    [AC_MSG_ERROR([--with-$1=$with_$1 is neither yes nor no nor a full path])]],
    [[AC_MSG_ERROR([--with-$1=$with_$1 is neither yes nor no; another folder for pkg-config is given
  by PKG_CONFIG_PATH, one for the compiler by CPPFLAGS and LDFLAGS])]]))
AS_IF([test "$with_$1" = no],
  [sebp_$1_summary="no: refused by --without-$1"],
  [$3
  AS_IF([test "$sebp_have_$1" = no && test "$with_$1" != check],
    [AC_MSG_ERROR([--with-$1 was given, but $2 cannot be used ($sebp_$1_summary)])])])])

# SEBP_PART_OPENMP
# ----------------
# OPENMP_CFLAGS, for compiling and linking alike.
AC_DEFUN([SEBP_PART_OPENMP],
[AC_ARG_WITH([openmp],
  [AS_HELP_STRING([--without-openmp], [work on one thread unless the host brings its own])],
  [], [with_openmp=check])
SEBP_PART([openmp], [OpenMP],
  [AC_CACHE_CHECK([for $CC option to support OpenMP], [sebp_cv_openmp],
    [sebp_cv_openmp=no
    sebp_saved_cflags=$CFLAGS
    for sebp_flag in -fopenmp -qopenmp; do
      CFLAGS="$sebp_saved_cflags $sebp_flag"
      AC_LINK_IFELSE([AC_LANG_PROGRAM([[
          #include <omp.h>
          #ifndef _OPENMP
          #error not OpenMP
          #endif]],
          [[return omp_get_max_threads() < 1]])],
        [sebp_cv_openmp=$sebp_flag
        break])
    done
    CFLAGS=$sebp_saved_cflags])
  AS_IF([test "$sebp_cv_openmp" != no],
    [sebp_have_openmp=yes
    OPENMP_CFLAGS=$sebp_cv_openmp
    AC_CACHE_CHECK([which OpenMP runtime that is], [sebp_cv_openmp_runtime],
      [sebp_saved_cflags=$CFLAGS
      CFLAGS="$CFLAGS $OPENMP_CFLAGS"
      # LLVM's has the functions that GNU's has too; not the other way round.
      AC_LINK_IFELSE([AC_LANG_PROGRAM([[void __kmpc_fork_call(void);]], [[__kmpc_fork_call()]])],
        [sebp_cv_openmp_runtime=LLVM], [sebp_cv_openmp_runtime=GNU])
      CFLAGS=$sebp_saved_cflags])
    sebp_openmp_summary="yes, the runtime of $sebp_cv_openmp_runtime"])])
AC_SUBST([OPENMP_CFLAGS])])

# SEBP_PART_ONEDNN
# ----------------
# ONEDNN_CPPFLAGS, ONEDNN_LIBS; SEBP_HAVE_ONEDNN and SEBP_ONEDNN_MAJOR, the generation of its API,
# for C; conditional ONEDNN. Debian's package has no .pc file, so the header and a symbol are tried.
AC_DEFUN([SEBP_PART_ONEDNN],
[AC_ARG_WITH([onednn],
  [AS_HELP_STRING([--with-onednn@<:@=PREFIX@:>@],
    [oneDNN, version 2 or 3, for matrix products @<:@default: if found@:>@])],
  [], [with_onednn=check])
SEBP_PART([onednn], [oneDNN],
  [SEBP_PREFIX([onednn], [dnnl.h], [], [dnnl])
  AC_MSG_CHECKING([for oneDNN])
  sebp_onednn_version=no
  AS_CASE([$with_onednn],
    [/*], [for sebp_folder in $sebp_onednn_folders; do
      AS_IF([test "$sebp_onednn_version" = no],
        [_SEBP_TRY_ONEDNN([-I$sebp_onednn_include], [-L$sebp_folder ], [$sebp_folder])])
    done],
    [_SEBP_TRY_ONEDNN([], [], [])])
  AC_MSG_RESULT([$sebp_onednn_version])
  AS_CASE([$sebp_onednn_version],
    [2|3],
      [sebp_have_onednn=yes
      sebp_onednn_summary="yes, version $sebp_onednn_version"
      AC_DEFINE([SEBP_HAVE_ONEDNN], [1], [Define if oneDNN is used.])
      AC_DEFINE_UNQUOTED([SEBP_ONEDNN_MAJOR], [$sebp_onednn_version],
        [The generation of oneDNN's API, 2 or 3.])],
    [no], [],
    [sebp_onednn_summary="no: version $sebp_onednn_version is neither 2 nor 3"])
  AS_IF([test "$sebp_have_onednn" = no],
    [ONEDNN_CPPFLAGS=
    ONEDNN_LIBS=])],
  [prefix])
AC_SUBST([ONEDNN_CPPFLAGS])
AC_SUBST([ONEDNN_LIBS])
AM_CONDITIONAL([ONEDNN], [test "$sebp_have_onednn" = yes])])

# _SEBP_TRY_ONEDNN(CPPFLAGS, PATH, FOLDER)
# ----------------------------------------
# Sets sebp_onednn_version if a program links: one that names what only the header's generation of
# the library has, so that the header of one and the library of another are not taken.
AC_DEFUN([_SEBP_TRY_ONEDNN],
[sebp_saved_cppflags=$CPPFLAGS
sebp_saved_libs=$LIBS
ONEDNN_CPPFLAGS="$1"
ONEDNN_LIBS="$2-ldnnl"
CPPFLAGS="$ONEDNN_CPPFLAGS $CPPFLAGS"
LIBS="$ONEDNN_LIBS $LIBS"
AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <dnnl.h>]], [[
    float x = 0;
    #if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_t description;
    dnnl_memory_desc_destroy(description);
    #else
    dnnl_memory_desc_t description;
    dnnl_dims_t dims = {1};
    dnnl_memory_desc_init_by_strides(&description, 1, dims, dnnl_f32, dims);
    #endif
    return dnnl_sgemm('N', 'N', 1, 1, 1, 1.0f, &x, 1, &x, 1, 0.0f, &x, 1) != dnnl_success]])],
  [# This one is run, and the library is not where the loader looks.
  LIBS=$sebp_saved_libs
  AC_COMPUTE_INT([sebp_onednn_version], [DNNL_VERSION_MAJOR], [#include <dnnl_version.h>],
    [sebp_onednn_version=no])
  SEBP_PREFIX_USED([$3])])
CPPFLAGS=$sebp_saved_cppflags
LIBS=$sebp_saved_libs])

# SEBP_PART_HWLOC
# ---------------
# HWLOC_CFLAGS, HWLOC_LIBS; SEBP_HAVE_HWLOC for C.
AC_DEFUN([SEBP_PART_HWLOC],
[AC_ARG_WITH([hwloc],
  [AS_HELP_STRING([--without-hwloc], [neither look at the machine's topology nor bind threads])],
  [], [with_hwloc=check])
SEBP_PART([hwloc], [hwloc],
  [PKG_CHECK_MODULES([HWLOC], [hwloc >= 2.5 hwloc < 3],
    [sebp_have_hwloc=yes
    sebp_hwloc_summary="yes, version `$PKG_CONFIG --modversion hwloc`"
    AC_DEFINE([SEBP_HAVE_HWLOC], [1], [Define if hwloc is used.])],
    [sebp_hwloc_summary="no: no version from 2.5 to below 3 found"])])])

# SEBP_PART_CHECK
# ---------------
# CHECK_CFLAGS, CHECK_LIBS; conditional CHECK.
AC_DEFUN([SEBP_PART_CHECK],
[AC_ARG_WITH([check],
  [AS_HELP_STRING([--without-check], [build no unit tests])],
  [], [with_check=check])
SEBP_PART([check], [Check],
  [PKG_CHECK_MODULES([CHECK], [check >= 0.11],
    [sebp_have_check=yes
    sebp_check_summary="yes, with Check `$PKG_CONFIG --modversion check`"],
    [sebp_check_summary="no: Check not found"])])
AM_CONDITIONAL([CHECK], [test "$sebp_have_check" = yes])])
