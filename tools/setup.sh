#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that the demo, the tests and napari need.
# On Debian and its relatives it installs missing system libraries too, with sudo where not root.
# Usage: tools/setup.sh   (make calls it when pyproject.toml or constraints.txt have changed)
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# What Qt's xcb platform plugin and OpenGL load at run time, and the X server that tests run under.
libraries=(
  xvfb xauth libgl1 libegl1 libopengl0 libgl1-mesa-dri libdbus-1-3 libfontconfig1 libxkbcommon-x11-0
  libxcb-cursor0 libxcb-icccm4 libxcb-image0 libxcb-keysyms1 libxcb-randr0 libxcb-render-util0
  libxcb-shape0 libxcb-xfixes0 libxcb-xinerama0 libxcb-xkb1
)

have_apt() { command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; }

install_packages() { # NAME ...: through apt-get, asking sudo for rights only where they lack
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "these Debian packages are missing and sudo isn't there to install them: $*"
    as_root=(sudo)
  fi
  say "installing Debian packages: $*"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

is_usable_python() { # COMMAND: runs (a pyenv shim may be there and not run), is new enough, and can make a venv
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if is_usable_python "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

if have_apt; then
  missing=()
  for name in "${libraries[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  # Debian splits venv and ensurepip off its python3.
  [ -x .venv/bin/python ] || [ -n "${PYTHON:-}" ] || find_python >/dev/null || missing+=(python3 python3-venv)
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
elif [ "$(uname -s)" = Linux ]; then
  say "no apt-get on this machine: system libraries are left as they are."
  say "If Qt or Xvfb don't start, install what Debian calls: ${libraries[*]}"
fi

if ! { [ -x .venv/bin/python ] && is_usable_python .venv/bin/python; }; then
  python=$(find_python) || die "Python 3.11 or newer with venv is needed, and none of ${PYTHON:-python3, python3.11, python3.12, python3.13} on the PATH is that. Install one, or name it: make PYTHON=/path/to/python3"
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

say "installing Python packages (some minutes the first time)"
# Dependency groups need pip 25.1.
.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
say "done"
