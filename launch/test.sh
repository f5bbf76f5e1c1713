#!/usr/bin/env bash
# Run the tests, installing what they need the first time:
#
#     bash launch/test.sh [pytest arguments …]      for example: -k sudoku, or -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment dev
exec "$PYTHON" -m pytest "$@"
