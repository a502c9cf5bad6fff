#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Stands in for the unit tests in a build without Check, so that their absence shows.
echo "The unit tests are NOT BUILT: configure did not find Check, or was told --without-check."
echo "Nothing but the scripts has been tested."
exit 77
