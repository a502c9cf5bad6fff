dnl SPDX-License-Identifier: Apache-2.0

# Names that LAPACKE goes by: a library of its own (netlib, Debian), or a part of OpenBLAS
# (openblaso and openblasp are Fedora's, with threads) or of FlexiBLAS.
m4_define([_sebp_lapack_names], [lapacke openblas openblaso openblasp flexiblas])

# SEBP_PART_LAPACK
# ----------------
# LAPACK_CPPFLAGS, LAPACK_LIBS; SEBP_HAVE_LAPACK for C.
AC_DEFUN([SEBP_PART_LAPACK],
[AC_ARG_WITH([lapack],
  [AS_HELP_STRING([--with-lapack@<:@=PREFIX@:>@],
    [LAPACK through LAPACKE, for the bases of SparseGrad @<:@default: if found@:>@])],
  [], [with_lapack=check])
SEBP_PART([lapack], [LAPACKE],
  [SEBP_PREFIX([lapack], [lapacke.h], [/openblas /lapacke /flexiblas], _sebp_lapack_names)
  AC_MSG_CHECKING([for LAPACKE])
  AS_CASE([$with_lapack],
    [/*], [for sebp_folder in $sebp_lapack_folders; do
      _SEBP_TRY_LAPACKE([-I$sebp_lapack_include], [-L$sebp_folder ], [$sebp_folder])
    done],
    [_SEBP_TRY_LAPACKE([], [], [])
    # Where the header lies in a folder of its own, as in Fedora.
    for sebp_name in lapacke openblas; do
      _SEBP_TRY_LAPACKE([`$PKG_CONFIG --cflags $sebp_name 2>&AS_MESSAGE_LOG_FD`], [], [])
    done])
  AC_MSG_RESULT([${LAPACK_LIBS:-no}])
  AS_IF([test "$sebp_have_lapack" = yes],
    [AC_DEFINE([SEBP_HAVE_LAPACK], [1], [Define if LAPACK is used.])])],
  [prefix])
AC_SUBST([LAPACK_CPPFLAGS])
AC_SUBST([LAPACK_LIBS])])

# _SEBP_TRY_LAPACKE(CPPFLAGS, PATH, FOLDER)
# -----------------------------------------
# Links with each name, and with what static libraries leave to the linker; the first that does it is
# taken. Of a PREFIX, PATH is the option that leads to FOLDER, which must hold the library.
AC_DEFUN([_SEBP_TRY_LAPACKE],
[sebp_saved_cppflags=$CPPFLAGS
sebp_saved_libs=$LIBS
sebp_flags="$1"
CPPFLAGS="$sebp_flags $CPPFLAGS"
for sebp_name in _sebp_lapack_names; do
  AS_IF([test -n "$3" && test ! -r "$3/lib$sebp_name.so" && test ! -r "$3/lib$sebp_name.a" &&
      test ! -r "$3/lib$sebp_name.dylib"], [continue])
  for sebp_more in '' ' -lgfortran' ' -llapack -lblas' ' -llapack -lblas -lgfortran'; do
    AS_IF([test "$sebp_have_lapack" = yes], [break])
    LIBS="$2-l$sebp_name$sebp_more $sebp_saved_libs"
    AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <lapacke.h>]], [[
        float a = 1, w, z, work@<:@64@:>@;
        lapack_int n = 64, found, support@<:@2@:>@, more@<:@64@:>@;
        return LAPACKE_ssyevd_work(LAPACK_COL_MAJOR, 'V', 'L', 1, &a, 1, &w, work, n, more, n) ||
               LAPACKE_ssyevr_work(LAPACK_COL_MAJOR, 'V', 'A', 'L', 1, &a, 1, 0, 0, 0, 0, 0, &found,
                                   &w, &z, 1, support, work, n, more, n)]])],
      [sebp_have_lapack=yes
      sebp_lapack_summary="yes, $2-l$sebp_name"
      LAPACK_CPPFLAGS=$sebp_flags
      LAPACK_LIBS="$2-l$sebp_name$sebp_more"
      SEBP_PREFIX_USED([$3])])
  done
done
CPPFLAGS=$sebp_saved_cppflags
LIBS=$sebp_saved_libs])
