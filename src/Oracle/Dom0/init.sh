#!/bin/sh
# Process 1 of the dom0 that runs guests for XenDomUBed: makes each guest of /guests a domain, waits for its end, and sends the
# host what it printed and how it ended. It ends with the machine.
#
# /guests/list has a line for each guest: INDEX NAME HUNDREDTHS-OF-A-SECOND-TO-RUN; /guests/INDEX.cfg is its xl configuration.
#
# The host reads from a virtio serial port that nothing else writes to:
#   ready
#   guest INDEX ENDING CONSOLE-BYTES REPORT-BYTES     ENDING: -rscwS as xl list shows it, ? for another reason, T for timed out
#   …console bytes…report bytes…newline
#   failed BYTES
#   …what went wrong…
#   done
export PATH=/bin

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mkdir -p /run/xen /run/lock /run/xenstored /var/lib/xen /var/log/xen/console

channel=
sender=
: >/tmp/tools.log
hypervisor_log=/var/log/xen/console/hypervisor.log

fail() { # TEXT: tells the host, with what the tools said, and ends.
    { echo "$1"; cat /tmp/tools.log; } >/tmp/failure
    # Only one process can have the channel open.
    [ -z "$sender" ] || wait "$sender"
    if [ -n "$channel" ]; then
        { echo "failed $(wc -c </tmp/failure)"; cat /tmp/failure; } >"$channel"
    fi
    cat /tmp/failure
    poweroff -f
    sleep 60
}

tool() { # COMMAND…: runs it; what it says is told if it fails.
    "$@" >/tmp/tools.log 2>&1 || fail "$* failed in dom0 (exit status $?):"
}

now() { # Hundredths of a second since dom0 started, in $now.
    read -r now _ </proc/uptime
    now=${now%.*}${now#*.}
    now=${now#0}
}

# The end of the log where a domain's report begins, in $log_start.
mark_log() { log_start=$(($(wc -c <"$hypervisor_log") + 1)); }

# Reads the state of domain $id into $state: ---s-- and so on, empty when there is none.
read_state() {
    state=
    xl list "$id" >/tmp/state 2>/dev/null && state=$(awk 'END { print $5 }' /tmp/state)
}

wait_for_end() { # HUNDREDTHS: waits for the end of domain $id; its letter in $ending.
    now
    deadline=$((now + $1))
    while :; do
        # Take the events that are there before looking: one that comes after the look then ends the wait.
        while read -r -t 0 <&3; do read -r _ <&3; done
        read_state
        case $state in
        ???s*) ending=${state#????} ending=${ending%?}; return ;;
        "") fail "domain $id of guest $name is gone:" ;;
        esac
        now
        left=$((deadline - now))
        if [ "$left" -le 0 ]; then
            tool xl pause "$id"
            ending=T
            return
        fi
        read -r -t $((left / 100 + 1)) _ <&3
    done
}

# Waits until xenconsoled has taken all that domain $id printed: then dom0's end of the domain's event channels is neither
# pending nor masked in Xen's dump of them ("[0/0/…"), which xenconsoled writes to the log as it does all that Xen prints.
settle() {
    tries=0
    while :; do
        mark=$(($(wc -c <"$hypervisor_log") + 1))
        tool xl debug-keys e
        polls=0
        while :; do
            tail -c "+$mark" "$hypervisor_log" >/tmp/dump
            grep -q "information for domain $id:" /tmp/dump && break
            polls=$((polls + 1))
            [ "$polls" -lt 500 ] || fail "xenconsoled does not pass on what Xen prints:"
            usleep 20000
        done
        sed "/information for domain $id:/,\$d" /tmp/dump | grep " d=$id p=" | grep -qvF '[0/0/' || return
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "xenconsoled does not take what guest $name printed:"
        usleep 50000
    done
}

send() { # INDEX NAME ENDING ID: sends the result and lets the domain go.
    log=/var/log/xen/console/guest-$2.log
    report=/tmp/report.$1
    {
        echo "guest $1 $3 $(wc -c <"$log") $(wc -c <"$report")"
        cat "$log" "$report"
        echo
    } >"$channel"
    rm -f "$log" "$report"
    tool xl destroy "$4"
}

cd /modules
while read -r module; do tool insmod "$module"; done <order
cd /
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = xensharp ] && channel=/dev/${port##*/}
done
[ -n "$channel" ] || fail "dom0 has no virtio serial port named xensharp:"
tool mount -t xenfs xenfs /proc/xen

tool xenstored --pid-file /run/xenstored.pid
tool xen-init-dom0
# It keeps the descriptors that it starts with; /tmp/tools.log is only for what fails.
xenconsoled --log=all --pid-file=/run/xenconsoled.pid >/dev/console 2>&1 || fail "xenconsoled does not start:"
mkfifo /tmp/ends
# xenstored fires this watch when any domain shuts down or is gone.
xenstore-watch @releaseDomain >/tmp/ends 2>/dev/null &
exec 3</tmp/ends
until [ -s "$hypervisor_log" ]; do usleep 20000; done

echo ready >"$channel"
id=0
while read -r index name time <&4; do
    # Xen counts domains up, and nobody else makes any here.
    id=$((id + 1))
    mark_log
    tool xl create -q -e "/guests/$index.cfg"
    wait_for_end "$time"
    settle
    tail -c "+$log_start" "$hypervisor_log" | sed "/ 'e' pressed -> /,\$d" >"/tmp/report.$index"
    # Sending and destroying go on while the next domain is made.
    [ -z "$sender" ] || wait "$sender"
    send "$index" "$name" "$ending" "$id" &
    sender=$!
done 4</guests/list
[ -z "$sender" ] || wait "$sender"
echo done >"$channel"
poweroff -f
