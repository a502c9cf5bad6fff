dnl SPDX-License-Identifier: Apache-2.0

# SEBP_PART_LAPACK
# ----------------
# LAPACK_CPPFLAGS, LAPACK_LIBS; SEBP_HAVE_LAPACK for C. LAPACKE is a library of its own, as in
# Debian, or a part of OpenBLAS, as OpenBLAS builds itself.
AC_DEFUN([SEBP_PART_LAPACK],
[AC_ARG_WITH([lapack],
  [AS_HELP_STRING([--with-lapack@<:@=PREFIX@:>@],
    [LAPACK through LAPACKE, for the bases of SparseGrad @<:@default: if found@:>@])],
  [], [with_lapack=check])
SEBP_PART([lapack], [LAPACKE],
  [AS_CASE([$with_lapack], [/*],
    [LAPACK_CPPFLAGS="-I$with_lapack/include"
    sebp_lapack_path="-L$with_lapack/lib "],
    [sebp_lapack_path=])
  sebp_saved_cppflags=$CPPFLAGS
  sebp_saved_libs=$LIBS
  CPPFLAGS="$CPPFLAGS $LAPACK_CPPFLAGS"
  AC_CACHE_CHECK([for LAPACKE], [sebp_cv_lapack],
    [sebp_cv_lapack=no
    for sebp_library in -llapacke -lopenblas; do
      LIBS="$sebp_lapack_path$sebp_library $sebp_saved_libs"
      AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <lapacke.h>]], [[
          float a = 1, w;
          return LAPACKE_ssyev(LAPACK_COL_MAJOR, 'V', 'L', 1, &a, 1, &w) != 0]])],
        [sebp_cv_lapack=$sebp_library
        break])
    done])
  CPPFLAGS=$sebp_saved_cppflags
  LIBS=$sebp_saved_libs
  AS_IF([test "$sebp_cv_lapack" != no],
    [sebp_have_lapack=yes
    sebp_lapack_summary="yes, $sebp_cv_lapack"
    LAPACK_LIBS=$sebp_lapack_path$sebp_cv_lapack
    AC_DEFINE([SEBP_HAVE_LAPACK], [1], [Define if LAPACK is used.])],
    [LAPACK_CPPFLAGS=])])
AC_SUBST([LAPACK_CPPFLAGS])
AC_SUBST([LAPACK_LIBS])])
