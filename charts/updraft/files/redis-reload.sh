# Make Redis read its certificate if the file is another one than at the last time. Connections stay open.
cmp -s /etc/redis-tls/tls.crt /run/redis/tls.crt && exit
# The copy is made first: it may be older than what Redis reads, never newer.
cp /etc/redis-tls/tls.crt /run/redis/next &&
  redis-cli -s /run/redis/redis.sock config set tls-cert-file /etc/redis-tls/tls.crt | grep -q OK &&
  mv /run/redis/next /run/redis/tls.crt
