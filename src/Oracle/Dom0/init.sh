#!/bin/sh
# Process 1 of the dom0 that runs guests for XenDomUBed: makes each guest of /guests a domain, waits for its end, and sends the
# host what it printed and how it ended. It ends with the machine.
#
# /guests/list has a line for each guest: INDEX NAME HUNDREDTHS-OF-A-SECOND-TO-RUN KIND; KIND is "alone", or "pair" if it runs together
# with the next one. /guests/INDEX.cfg is its xl configuration.
#
# The host reads from a virtio serial port that nothing else writes to:
#   ready
#   guest INDEX ENDING CONSOLE-BYTES REPORT-BYTES     ENDING: -rscwS as in xl list, ? for another reason, T for timed out
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
        size /tmp/failure
        { echo "failed $size"; cat /tmp/failure; } >"$channel"
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

nap() { read -r -t "$1" _ <&3; } # SECONDS: sleeps without a process of its own; nothing ever comes out of that pipe.

size() { set -- $(wc -c "$1") && size=$1; } # FILE: its size in bytes, in $size.

start() { # INDEX NAME [-p]: makes the domain; its number in $id, the process that waits for its end in $monitor.
    tool xl create -q $3 "/guests/$1.cfg"
    id=
    tries=0
    # "Waiting for domain NAME (domid ID) to die [pid MONITOR]"
    until [ -n "$id" ]; do
        while read -r line; do
            case $line in "Waiting for domain "*)
                id=${line#*domid } id=${id%%)*} monitor=${line##*pid } monitor=${monitor%]*} ;;
            esac
        done <"/var/log/xen/xl-$2.log" 2>/dev/null
        [ -n "$id" ] || nap 0.02
        tries=$((tries + 1))
        [ "$tries" -lt 1000 ] || fail "xl does not watch over guest $2:"
    done
}

wait_for_end() { # NAME HUNDREDTHS: waits for the end of the domain; its letter in $ending.
    now
    deadline=$((now + $2))
    # It was told to leave the domain as it is, and ends once it has noted why the domain shut down.
    while [ -d "/proc/$monitor" ]; do
        nap 0.03
        now
        if [ "$now" -ge "$deadline" ]; then
            tool xl pause "$id"
            ending=T
            return
        fi
    done
    read_ending "$1"
}

read_ending() { # NAME: the letter of the end that xl has noted, in $ending.
    ending=
    while read -r line; do
        # "Domain ID has shut down, reason code 3 0x3"
        case $line in
        "Unknown shutdown reason"*) ending=? ;;
        *" reason code 0 "*) ending=- ;;
        *" reason code 1 "*) ending=r ;;
        *" reason code 2 "*) ending=s ;;
        *" reason code 3 "*) ending=c ;;
        *" reason code 4 "*) ending=w ;;
        *" reason code 5 "*) ending=S ;;
        esac
    done <"/var/log/xen/xl-$1.log"
    [ -n "$ending" ] || { cat "/var/log/xen/xl-$1.log" >/tmp/tools.log; fail "xl does not know how guest $1 ended:"; }
}

# Waits until xenconsoled has taken all that the domain printed, and all that Xen logged. It has when it sleeps in poll without a
# timeout: a timeout means that it has put a domain off for printing too fast, and with something to take it would not sleep. dom0
# has one processor, so what was signalled before the domain's end has reached xenconsoled by the time that this runs.
settle() { # NAME
    now
    deadline=$((now + 6000))
    while :; do
        # The number of the system call and its arguments in hexadecimal; 7 is poll, its third argument the timeout, -1 for none.
        read -r call _ _ timeout _ <"/proc/$consoled/syscall"
        case "$call $timeout" in "7 0xffffffff" | "7 0xffffffffffffffff") return ;; esac
        nap 0.02
        now
        [ "$now" -lt "$deadline" ] || fail "xenconsoled does not take what guest $1 printed:"
    done
}

is_over() { # NAME ID MONITOR LATE: whether a domain of a pair has ended, or is stopped as LATE; then $ending, and the domain is gone.
    if [ ! -d "/proc/$3" ]; then
        read_ending "$1"
    elif [ -n "$4" ]; then
        tool xl pause "$2"
        ending=T
    else
        return 1
    fi
    settle "$1"
    [ "$ending" = "?" ] || tool xl destroy "$2"
}

run_pair() { # INDEX NAME INDEX NAME HUNDREDTHS: runs two guests at once; their letters in $ending_a and $ending_b.
    start "$1" "$2" -p
    id_a=$id monitor_a=$monitor
    start "$3" "$4" -p
    [ "$id" -eq $((id_a + 1)) ] || fail "Guest $4 is domain $id, not the next after guest $2, which is domain $id_a:"
    tool xl unpause "$id_a"
    tool xl unpause "$id"
    now
    # Settling has a deadline of its own.
    last=$((now + $5))
    ending_a= ending_b= late=
    until [ -n "$ending_a" ] && [ -n "$ending_b" ]; do
        nap 0.03
        now
        [ "$now" -lt "$last" ] || late=1
        if [ -z "$ending_a" ] && is_over "$2" "$id_a" "$monitor_a" "$late"; then ending_a=$ending; fi
        if [ -z "$ending_b" ] && is_over "$4" "$id" "$monitor" "$late"; then ending_b=$ending; fi
    done
}

send() { # INDEX NAME ENDING ID: sends the result and lets the domain go; no ID if it has gone.
    log=/var/log/xen/console/guest-$2.log
    size "$log"; console_size=$size
    size "/tmp/report.$1"
    {
        echo "guest $1 $3 $console_size $size"
        cat "$log" "/tmp/report.$1"
        echo
    } >"$channel"
    rm -f "$log" "/tmp/report.$1" "/var/log/xen/xl-$2.log"
    # xl has already destroyed what gave no known reason.
    [ "$3" = "?" ] || [ -z "$4" ] || tool xl destroy "$4"
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
# Whatever it says, it says on dom0's console: it keeps the descriptors that it starts with.
xenconsoled --log=all --pid-file=/run/xenconsoled.pid >/dev/console 2>&1 || fail "xenconsoled does not start:"
mkfifo /tmp/never
exec 3<>/tmp/never
until [ -s "$hypervisor_log" ] && read -r consoled </run/xenconsoled.pid; do nap 0.02; done

echo ready >"$channel"
settle "before the first"
size "$hypervisor_log"
while read -r index name time kind <&4; do
    log_start=$((size + 1))
    if [ "$kind" = pair ]; then
        read -r second second_name _ <&4
        run_pair "$index" "$name" "$second" "$second_name" "$time"

        # What Xen said is about both; the first has it.
        tail -c "+$log_start" "$hypervisor_log" >"/tmp/report.$index"
        : >"/tmp/report.$second"
        size "$hypervisor_log"
        [ -z "$sender" ] || wait "$sender"
        { send "$index" "$name" "$ending_a"; send "$second" "$second_name" "$ending_b"; } &
        sender=$!
        continue
    fi
    start "$index" "$name"
    wait_for_end "$name" "$time"
    settle "$name"
    tail -c "+$log_start" "$hypervisor_log" >"/tmp/report.$index"
    size "$hypervisor_log"
    # Sending and destroying go on while the next domain is made.
    [ -z "$sender" ] || wait "$sender"
    send "$index" "$name" "$ending" "$id" &
    sender=$!
done 4</guests/list
[ -z "$sender" ] || wait "$sender"
echo done >"$channel"
poweroff -f
