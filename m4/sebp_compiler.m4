dnl SPDX-License-Identifier: Apache-2.0

# _SEBP_COMPILER_SAYS(FLAGS, FILE)
# --------------------------------
# Compiles a small program with FLAGS where make has them, before the builder's, and leaves in FILE
# what the compiler says of it.
AC_DEFUN([_SEBP_COMPILER_SAYS],
[(set -x; $CC -c $1 $CFLAGS $CPPFLAGS conftest.$ac_ext) >$2 2>&1])

# SEBP_COMPILER_FLAG(FLAG, VARIABLE)
# ----------------------------------
# Appends FLAG to the output variable VARIABLE if the compiler takes it and says no more than it does
# without. What it has to say of the builder's own flags (clang on a linker's flag in CFLAGS) does
# not count, as it would with -Werror.
AC_DEFUN([SEBP_COMPILER_FLAG],
[AS_VAR_PUSHDEF([sebp_cache], [sebp_cv_flag_$1])dnl
AC_CACHE_CHECK([whether $CC takes $1], [sebp_cache],
  [AC_LANG_CONFTEST([AC_LANG_PROGRAM()])
  AS_VAR_SET([sebp_cache], [no])
  AS_IF([_SEBP_COMPILER_SAYS([], [conftest.without]) && _SEBP_COMPILER_SAYS([$1], [conftest.with])],
    [AS_IF([test `wc -l <conftest.with` -eq `wc -l <conftest.without`],
      [AS_VAR_SET([sebp_cache], [yes])])])
  cat conftest.with* >&AS_MESSAGE_LOG_FD
  rm -f conftest.with* conftest.$ac_ext conftest.$ac_objext])
AS_VAR_IF([sebp_cache], [yes], [AS_VAR_APPEND([$2], [" $1"])])
AS_VAR_POPDEF([sebp_cache])dnl
AC_SUBST([$2])])

# SEBP_WARNINGS
# -------------
# WARN_CFLAGS; warnings are errors with --enable-werror, but for those about the builder's flags.
AC_DEFUN([SEBP_WARNINGS],
[AC_ARG_ENABLE([werror],
  [AS_HELP_STRING([--enable-werror], [take compiler warnings as errors])],
  [], [enable_werror=no])
m4_foreach_w([sebp_flag], [-Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes],
  [SEBP_COMPILER_FLAG(sebp_flag, [WARN_CFLAGS])])
AS_IF([test "$enable_werror" = yes],
  [WARN_CFLAGS="$WARN_CFLAGS -Werror"
  SEBP_COMPILER_FLAG([-Wno-error=unused-command-line-argument], [WARN_CFLAGS])])
AC_SUBST([WARN_CFLAGS])])

# SEBP_SANITIZERS
# ---------------
# SANITIZE_CFLAGS, for compiling and linking alike.
AC_DEFUN([SEBP_SANITIZERS],
[AC_ARG_ENABLE([sanitizers],
  [AS_HELP_STRING([--enable-sanitizers],
    [build with AddressSanitizer and UndefinedBehaviorSanitizer])],
  [], [enable_sanitizers=no])
AS_IF([test "$enable_sanitizers" = yes],
  [SANITIZE_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
  SANITIZE_CFLAGS="$SANITIZE_CFLAGS -fno-omit-frame-pointer"
  sebp_saved_cflags=$CFLAGS
  CFLAGS="$CFLAGS $SANITIZE_CFLAGS"
  AC_MSG_CHECKING([whether sanitized programs link])
  AC_LINK_IFELSE([AC_LANG_PROGRAM()],
    [AC_MSG_RESULT([yes])],
    [AC_MSG_RESULT([no])
    AC_MSG_ERROR([--enable-sanitizers: $CC cannot link with $SANITIZE_CFLAGS])])
  CFLAGS=$sebp_saved_cflags])
AC_SUBST([SANITIZE_CFLAGS])])

# SEBP_VISIBILITY
# ---------------
# VISIBILITY_CFLAGS: symbols are hidden but where the headers say SEBP_API.
AC_DEFUN([SEBP_VISIBILITY],
[SEBP_COMPILER_FLAG([-fvisibility=hidden], [VISIBILITY_CFLAGS])])

# SEBP_VERSION_SCRIPT
# -------------------
# Conditional VERSION_SCRIPT: the linker takes a symbol map.
AC_DEFUN([SEBP_VERSION_SCRIPT],
[AC_CACHE_CHECK([whether the linker takes --version-script], [sebp_cv_version_script],
  [AS_ECHO(["SEBP_TEST { global: main; local: *; };"]) > conftest.map
  sebp_saved_ldflags=$LDFLAGS
  LDFLAGS="$LDFLAGS -Wl,--version-script=conftest.map"
  AC_LINK_IFELSE([AC_LANG_PROGRAM()],
    [sebp_cv_version_script=yes], [sebp_cv_version_script=no])
  LDFLAGS=$sebp_saved_ldflags
  rm -f conftest.map])
AM_CONDITIONAL([VERSION_SCRIPT], [test "$sebp_cv_version_script" = yes])])
