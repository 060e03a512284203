#!/bin/sh
# Start Redis with the users of users.acl; the password comes from the environment, as its hash.
set -eu

: "${REDIS_PASSWORD:?is not set}"
hash=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
users=${USERS_FILE:-/run/redis/users.acl}
here=$(dirname "$0")
sed "s/@REDIS_PASSWORD_SHA256@/$hash/" "$here/users.acl" > "$users"
unset REDIS_PASSWORD
exec redis-server "$here/redis.conf" --dir "${DATA_DIR:-/data}" --aclfile "$users" "$@"
