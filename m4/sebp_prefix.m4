dnl SPDX-License-Identifier: Apache-2.0

# SEBP_PREFIX(PART, HEADER, FOLDERS, LIBRARIES)
# ---------------------------------------------
# Where --with-PART names a PREFIX, looks in it for HEADER, in its include folders and in FOLDERS
# (/NAME each) of those, and for one of LIBRARIES, by name. Sets
#
#   sebp_PART_include    the folder of HEADER
#   sebp_PART_folders    the folders with a library
#   sebp_PART_summary    "no: ", what was looked for, and where
#
# Both are empty without a PREFIX: the compiler's own folders serve. A library of the same name there
# does not stand in for one that the PREFIX lacks.
AC_DEFUN([SEBP_PREFIX],
[AC_REQUIRE([AC_CANONICAL_HOST])dnl
sebp_$1_include= sebp_$1_folders=
AS_CASE([$with_$1], [/*],
  [sebp_multiarch=`$CC -print-multiarch 2>/dev/null` || sebp_multiarch=
  AS_IF([test -z "$sebp_multiarch"], [sebp_multiarch=$host_cpu-$host_os])
  for sebp_base in include include/$sebp_multiarch; do
    for sebp_folder in '' $3; do
      sebp_file=$with_$1/$sebp_base$sebp_folder
      AS_IF([test -z "$sebp_$1_include" && test -r "$sebp_file/$2"],
        [sebp_$1_include=$sebp_file])
    done
  done
  for sebp_base in lib64 lib lib/$sebp_multiarch; do
    sebp_folder=$with_$1/$sebp_base
    for sebp_name in $4; do
      AS_IF([test -r "$sebp_folder/lib$sebp_name.so" || test -r "$sebp_folder/lib$sebp_name.a" ||
          test -r "$sebp_folder/lib$sebp_name.dylib"],
        [AS_VAR_APPEND([sebp_$1_folders], [" $sebp_folder"])
        break])
    done
  done
  sebp_$1_summary="no: looked in lib64, lib and lib/$sebp_multiarch of $with_$1 for a library ($4)"
  sebp_$1_summary="$sebp_$1_summary and in its include for $2"
  AS_IF([test -z "$sebp_$1_include"],
    [sebp_$1_summary="$sebp_$1_summary; $2 is not there"],
    [test -z "$sebp_$1_folders"],
    [sebp_$1_summary="$sebp_$1_summary; no such library is there"],
    [sebp_$1_summary="$sebp_$1_summary; both are there, but a program does not link: see config.log"])])])

# SEBP_PREFIX_USED(FOLDER)
# ------------------------
# What is linked with a library of a PREFIX finds it there when it runs: PREFIX_RPATH for libtool,
# PREFIX_LIBS for the compiler. The system's folders need none.
AC_DEFUN([SEBP_PREFIX_USED],
[AS_CASE(["$1"], [''|/lib|/lib/*|/lib64|/usr/lib|/usr/lib/*|/usr/lib64], [],
  [AS_CASE([" $PREFIX_RPATH "], [*" -R$1 "*], [],
    [PREFIX_RPATH="$PREFIX_RPATH -R$1"
    PREFIX_LIBS="$PREFIX_LIBS -Wl,-rpath,$1"])])
AC_SUBST([PREFIX_RPATH])
AC_SUBST([PREFIX_LIBS])])
