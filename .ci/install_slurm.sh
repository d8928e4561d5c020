#!/bin/bash
# Debian's Slurm for tests/test_slurm.py, where this is root on a Debian; else say why not. Never
# fails: without Slurm those tests skip themselves with the reason.
PATH=$PATH:/usr/sbin:/sbin
if type -P slurmctld slurmd munged sbatch >/dev/null; then
    exit 0
elif [ "$(id -u)" -ne 0 ] || ! type -P apt-get >/dev/null; then
    echo "Slurm is not installed, and this is not root on a Debian: its tests will be skipped."
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# Its daemons must not be started by the packages: the tests have their own.
policy=/usr/sbin/policy-rc.d
made=
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=1; }
log=$(mktemp)
install() { timeout 300 apt-get install -y -q --no-install-recommends slurm-wlm munge; }
if ! { install || { timeout 120 apt-get update -q && install; }; } </dev/null >"$log" 2>&1; then
    echo "Slurm could not be installed, its tests will be skipped: $(tail -n 1 "$log")"
fi
rm -f "$log" ${made:+$policy}
exit 0
