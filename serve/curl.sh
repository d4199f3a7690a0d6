#!/bin/sh
# Ask a served adapter with curl: serve/curl.sh MODEL "QUERY" [URL]
# The key, when the server needs one, is read from PI_RAY_API_KEY. Needs curl and python3 (which quotes the query).
set -eu
[ $# -ge 2 ] || { echo 'usage: serve/curl.sh MODEL "QUERY" [URL]' >&2; exit 2; }
body=$(python3 -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "messages": [{"role": "user", "content": sys.argv[2]}]}))' "$1" "$2")
# The header goes through a file descriptor: what stands on a command line can be seen by every user of the machine.
printf 'Authorization: Bearer %s\n' "${PI_RAY_API_KEY:-none}" |
  curl -sS --fail-with-body "${3:-http://127.0.0.1:8000}/v1/chat/completions" -H @- -H 'Content-Type: application/json' -d "$body"
echo
