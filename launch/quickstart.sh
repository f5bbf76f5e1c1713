#!/usr/bin/env bash
# Train a tiny diffusion language model with TraceRL on two CPU cores, from nothing but Python 3.11+ and pip:
#
#     bash launch/quickstart.sh [key=value …]       for example: seed=1, recipe=quickstart_full, dry_run=true, help=true
#
# Runs in the checkout's folder: results go to outputs/ there. See environment.sh for what is installed where.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
exec "$PYTHON" -m rlpipe.run recipe=quickstart "$@"
