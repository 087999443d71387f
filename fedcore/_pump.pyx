# cython: language_level=3, boundscheck=False, wraparound=False
"""The frame pump: moves frames between one ZeroMQ socket and the compiled core without the GIL.

The pump calls the libzmq that pyzmq itself was built with: its functions are looked up in pyzmq's own
extension module, so there is no second libzmq in the process and nothing to install. Where they cannot be
found, importing this module fails with ImportError and `fedcore.transport.link` uses its plain Python loop, which
follows the same rules.

One thread runs `run` and owns the network socket until it returns. It wakes up for a frame, for a
command from Python, or for a timer of the core; it never spins.

Where connections are encrypted, the sink and the inbox know a peer as ``USER NUL ROUTING-ID``. The user is what
the server's door gave the connection (ZeroMQ's "User-Id"), so that nothing a peer says can make it another.

Of each connection it notes, by its file number, whether it was understood last or may go, at once or soon, whose it is,
and that a message of it was whole; the door reads that (`fedcore.security.connections`). libzmq tells the number with
each message.

A site's socket has one connection. Where nothing comes over it any more (`silence.hpp`), the pump lets go of it and
dials the same address again.

Commands (PULL socket):  [b"S", peer, header, body] send;  [b"K"] look for frames to send;  [b"Q"] quit;
                         [b"D", endpoint] connect to this address in place of the last one.
Inbox (PUSH socket):     [b"E"] the core has events or control messages; the first one says that the pump runs.
"""

import zmq.backend.cython._zmq as _backend

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.errno cimport EAGAIN, EHOSTUNREACH, EINTR
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport atoi, free, malloc
from libc.string cimport memchr, memcpy, strlen


cdef extern from "transfer/sink.h" nogil:
    ctypedef struct FcOut:
        const uint8_t* peer
        size_t peer_len
        const uint8_t* header
        const void* body
        size_t body_len
        void* owner

    ctypedef struct FcSink:
        void* self
        int (*deliver)(void*, int64_t, const void*, size_t, const void*, size_t, const void*, size_t,
                       void*, void (*)(void*) noexcept nogil) noexcept nogil
        int (*next_out)(void*, int64_t, FcOut*) noexcept nogil
        void (*out_done)(void*) noexcept nogil
        int64_t (*tick)(void*, int64_t) noexcept nogil
        int (*has_event)(void*) noexcept nogil
        int wake_fd
        void (*clear_wake)(void*) noexcept nogil
        void (*unreachable)(void*, const void*, size_t) noexcept nogil
        int (*silent)(void*, int64_t) noexcept nogil
        void (*dialled)(void*, int64_t) noexcept nogil
        void (*sent)(void*, int64_t, size_t) noexcept nogil
        void (*moved)(void*, int64_t, int64_t, int64_t) noexcept nogil

cdef extern from "<dlfcn.h>" nogil:
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    int RTLD_LAZY
    int RTLD_NOLOAD

cdef extern from "<sys/socket.h>" nogil:
    int getsockopt(int, int, int, void*, unsigned int*)

cdef extern from "<time.h>" nogil:
    ctypedef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec*)
    int CLOCK_MONOTONIC

# The public ABI of libzmq 4: a message is 64 opaque bytes, a poll item is (socket, fd, events, revents).
cdef struct Msg:
    int64_t opaque[8]

cdef struct PollItem:
    void* socket
    int fd
    short events
    short revents

cdef enum:
    ZMQ_POLLIN = 1
    ZMQ_DONTWAIT = 1
    ZMQ_SNDMORE = 2
    ZMQ_LINGER = 17
    ZMQ_IPV6 = 42
    IPPROTO_TCP = 6
    TCP_INFO = 11  # of Linux
    INFO_ACKED = 120  # where it has the bytes acknowledged, and the bytes received
    INFO_RECEIVED = 128
    LOOK_MS = 1000
    MAX_ENDPOINT = 512
    SINK_TAKEN = 1
    SINK_DROP = 3
    SINK_UNHEARD = 4
    SINK_MUTED = 5
    NOTE_HEARD = 1
    NOTE_CUT = 2
    NOTE_MUTED = 3
    BATCH = 64
    MAX_ID = 255

ctypedef void (*free_fn)(void*, void*) noexcept nogil

cdef struct Notes:  # of connections, by file number
    uint8_t* of
    uint8_t* moved
    uint32_t* owners
    size_t count

cdef struct Dial:  # a site's connection: where to, and what is known of it
    char endpoint[512]
    int number  # the file of the last message; -1: none yet
    int64_t looked_ms

cdef struct Zmq:
    int (*msg_init)(Msg*) noexcept nogil
    int (*msg_init_size)(Msg*, size_t) noexcept nogil
    int (*msg_init_data)(Msg*, void*, size_t, free_fn, void*) noexcept nogil
    int (*msg_move)(Msg*, Msg*) noexcept nogil
    int (*msg_recv)(Msg*, void*, int) noexcept nogil
    int (*msg_send)(Msg*, void*, int) noexcept nogil
    int (*msg_close)(Msg*) noexcept nogil
    void* (*msg_data)(Msg*) noexcept nogil
    size_t (*msg_size)(const Msg*) noexcept nogil
    int (*msg_more)(const Msg*) noexcept nogil
    const char* (*msg_gets)(const Msg*, const char*) noexcept nogil
    int (*poll)(PollItem*, int, long) noexcept nogil
    int (*connect)(void*, const char*) noexcept nogil
    int (*disconnect)(void*, const char*) noexcept nogil
    int (*setsockopt)(void*, int, const void*, size_t) noexcept nogil
    int (*getsockopt)(void*, int, void*, size_t*) noexcept nogil
    int (*zmq_errno)() noexcept nogil

cdef Zmq z
cdef void (*release_out)(void*) noexcept nogil


cdef void* _symbol(void* library, const char* name) except NULL:
    cdef void* found = dlsym(library, name)
    if found == NULL:
        raise ImportError(f"pyzmq's libzmq does not export {name.decode()}")
    return found


cdef _load():
    cdef void* library = dlopen(_backend.__file__.encode(), RTLD_NOLOAD | RTLD_LAZY)
    cdef int major = 0, minor = 0, patch = 0
    if library == NULL:
        raise ImportError("pyzmq's extension module is not loaded as a shared library")
    (<void (*)(int*, int*, int*) noexcept> _symbol(library, b"zmq_version"))(&major, &minor, &patch)
    if major != 4:
        raise ImportError(f"the frame pump knows libzmq 4, and pyzmq has {major}.{minor}.{patch}")
    z.msg_init = <int (*)(Msg*) noexcept nogil> _symbol(library, b"zmq_msg_init")
    z.msg_init_size = <int (*)(Msg*, size_t) noexcept nogil> _symbol(library, b"zmq_msg_init_size")
    z.msg_init_data = <int (*)(Msg*, void*, size_t, free_fn, void*) noexcept nogil> _symbol(
        library, b"zmq_msg_init_data")
    z.msg_move = <int (*)(Msg*, Msg*) noexcept nogil> _symbol(library, b"zmq_msg_move")
    z.msg_recv = <int (*)(Msg*, void*, int) noexcept nogil> _symbol(library, b"zmq_msg_recv")
    z.msg_send = <int (*)(Msg*, void*, int) noexcept nogil> _symbol(library, b"zmq_msg_send")
    z.msg_close = <int (*)(Msg*) noexcept nogil> _symbol(library, b"zmq_msg_close")
    z.msg_data = <void* (*)(Msg*) noexcept nogil> _symbol(library, b"zmq_msg_data")
    z.msg_size = <size_t (*)(const Msg*) noexcept nogil> _symbol(library, b"zmq_msg_size")
    z.msg_more = <int (*)(const Msg*) noexcept nogil> _symbol(library, b"zmq_msg_more")
    z.msg_gets = <const char* (*)(const Msg*, const char*) noexcept nogil> _symbol(
        library, b"zmq_msg_gets")
    z.poll = <int (*)(PollItem*, int, long) noexcept nogil> _symbol(library, b"zmq_poll")
    z.connect = <int (*)(void*, const char*) noexcept nogil> _symbol(library, b"zmq_connect")
    z.disconnect = <int (*)(void*, const char*) noexcept nogil> _symbol(library, b"zmq_disconnect")
    z.setsockopt = <int (*)(void*, int, const void*, size_t) noexcept nogil> _symbol(
        library, b"zmq_setsockopt")
    z.getsockopt = <int (*)(void*, int, void*, size_t*) noexcept nogil> _symbol(
        library, b"zmq_getsockopt")
    z.zmq_errno = <int (*)() noexcept nogil> _symbol(library, b"zmq_errno")


_load()


cdef int64_t _now_ms() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t> t.tv_sec * 1000 + t.tv_nsec // 1000000


cdef void _release_in(void* owner) noexcept nogil:
    z.msg_close(<Msg*> owner)
    free(owner)


cdef void _release_body(void* data, void* hint) noexcept nogil:
    release_out(hint)


cdef int _send_copy(void* socket, const void* data, size_t size, int flags) noexcept nogil:
    """Send a copy of a small frame; -1 on failure, the errno left as libzmq set it."""
    cdef Msg msg
    if z.msg_init_size(&msg, size) != 0:
        return -1
    if size:
        memcpy(z.msg_data(&msg), data, size)
    if z.msg_send(&msg, socket, flags | ZMQ_DONTWAIT) < 0:
        z.msg_close(&msg)
        return -1
    return 0


cdef void _send_out(void* net, bint router, bint secure, FcOut* out, FcSink* sink) noexcept nogil:
    """Send one data frame; its body goes out without a copy. A peer that is gone loses the frame, which
    the sink is told: the side that waits for it asks again."""
    cdef Msg body
    cdef int more = ZMQ_SNDMORE if out.body_len else 0
    cdef const uint8_t* nul
    cdef const uint8_t* routing_id = out.peer
    cdef size_t id_len = out.peer_len
    if secure:
        nul = <const uint8_t*> memchr(out.peer, 0, out.peer_len)
        if nul != NULL:
            id_len -= nul + 1 - out.peer
            routing_id = nul + 1
    if router and _send_copy(net, routing_id, id_len, ZMQ_SNDMORE) != 0:
        if z.zmq_errno() == EHOSTUNREACH:
            sink.unreachable(sink.self, out.peer, out.peer_len)
        release_out(out.owner)
        return
    if _send_copy(net, out.header, 48, more) != 0 or not out.body_len:
        release_out(out.owner)
        return
    if z.msg_init_data(&body, <void*> out.body, out.body_len, _release_body, out.owner) != 0:
        release_out(out.owner)
        _send_copy(net, NULL, 0, 0)  # closes the multipart message; the receiver refuses it
        return
    if z.msg_send(&body, net, ZMQ_DONTWAIT) < 0:
        z.msg_close(&body)


cdef int _recv_frame(Msg* msg, void* socket, int flags) noexcept nogil:
    """Receive one frame into an initialised message: 0, or -1 with the errno set."""
    while z.msg_recv(msg, socket, flags) < 0:
        if z.zmq_errno() != EINTR:
            return -1
    return 0


cdef size_t _discard_rest(void* socket, Msg* last) noexcept nogil:
    """Receive what is left of a message; returns its bytes."""
    cdef size_t size = 0
    while z.msg_more(last):
        if _recv_frame(last, socket, 0) != 0:
            return size
        size += z.msg_size(last)
    return size


cdef size_t _name_peer(char* name, Msg* peer, Msg* header) noexcept nogil:
    """Write USER NUL ROUTING-ID into ``name`` (2 * MAX_ID + 1 bytes); returns its length."""
    cdef const char* user = z.msg_gets(header, b"User-Id")
    cdef size_t user_len = strlen(user) if user != NULL else 0
    cdef size_t id_len = z.msg_size(peer)
    if user_len > MAX_ID:
        user_len = 0
    if id_len > MAX_ID:
        id_len = MAX_ID
    memcpy(name, user, user_len)
    name[user_len] = 0
    memcpy(name + user_len + 1, z.msg_data(peer), id_len)
    return user_len + 1 + id_len


cdef uint32_t _owner(Msg* header) noexcept nogil:
    """Return a checksum (FNV-1a) of the user that a message is of."""
    cdef const char* user = z.msg_gets(header, b"User-Id")
    cdef uint32_t found = 2166136261u
    while user != NULL and user[0] != 0:
        found = (found ^ <uint8_t> user[0]) * 16777619u
        user += 1
    return found


cdef void _note(Notes notes, Msg* header, int verdict) noexcept nogil:
    cdef const char* text
    cdef int number
    if notes.count == 0:
        return
    text = z.msg_gets(header, b"__fd")
    number = atoi(text) if text != NULL else -1
    if 0 <= number < <int> notes.count:
        notes.moved[number] = 1
        notes.owners[number] = _owner(header)
        if verdict == SINK_DROP:
            return
        if verdict == SINK_MUTED and notes.of[number] in (NOTE_HEARD, NOTE_MUTED):
            notes.of[number] = NOTE_MUTED
        elif verdict in (SINK_UNHEARD, SINK_MUTED):  # who was never heard there is told nothing there
            notes.of[number] = NOTE_CUT
        else:
            notes.of[number] = NOTE_HEARD


cdef void _dial(void* net, Dial* dial, const char* endpoint, size_t size, FcSink* sink) noexcept nogil:
    """Let go of the connection, if there is one, and connect to ``endpoint``, whose address is a number.

    What waits for the old connection is dropped. libzmq would go on dialling to send it, and where both connections
    came up, the server might keep the old one: of two with one id it hears the later one, and never closes the other.
    """
    cdef int v6
    cdef int linger = 0
    cdef int none = 0
    cdef size_t size_of = sizeof(linger)
    if dial.endpoint[0] != 0:
        z.getsockopt(net, ZMQ_LINGER, &linger, &size_of)
        z.setsockopt(net, ZMQ_LINGER, &none, sizeof(none))
        z.disconnect(net, dial.endpoint)
        z.setsockopt(net, ZMQ_LINGER, &linger, sizeof(linger))
    if endpoint != dial.endpoint:
        size = min(size, <size_t> (MAX_ENDPOINT - 1))
        memcpy(dial.endpoint, endpoint, size)
        dial.endpoint[size] = 0
    v6 = memchr(dial.endpoint, c"[", strlen(dial.endpoint)) != NULL
    z.setsockopt(net, ZMQ_IPV6, &v6, sizeof(v6))
    z.connect(net, dial.endpoint)
    dial.number = -1
    sink.dialled(sink.self, _now_ms())


cdef void _look(Dial* dial, FcSink* sink) noexcept nogil:
    """Tell the sink how much has moved over the connection: a long message is none before its end."""
    cdef uint8_t about[136]
    cdef unsigned int size = sizeof(about)
    cdef int64_t received = -1, acked = -1
    cdef int64_t now = _now_ms()
    if dial.number < 0 or now - dial.looked_ms < LOOK_MS:
        return
    dial.looked_ms = now
    if getsockopt(dial.number, IPPROTO_TCP, TCP_INFO, about, &size) == 0 and size >= sizeof(about):
        memcpy(&received, &about[INFO_RECEIVED], sizeof(received))
        memcpy(&acked, &about[INFO_ACKED], sizeof(acked))
    sink.moved(sink.self, now, received, acked)


cdef int _pump_in(void* net, bint router, bint secure, Notes notes, Dial* dial, FcSink* sink) noexcept nogil:
    """Receive and deliver one message: 1 done, 0 nothing there, -1 the socket is closed."""
    cdef Msg peer, header, body
    cdef Msg* kept
    cdef int verdict
    cdef bint well_formed
    cdef size_t rest = 0
    cdef const char* number
    cdef char name[2 * 255 + 1]
    cdef const void* who
    cdef size_t who_len
    z.msg_init(&peer)
    z.msg_init(&header)
    z.msg_init(&body)
    if _recv_frame(&peer if router else &header, net, ZMQ_DONTWAIT) != 0:
        verdict = z.zmq_errno()
        z.msg_close(&peer)
        z.msg_close(&header)
        z.msg_close(&body)
        return 0 if verdict == EAGAIN else -1
    well_formed = True
    if router:
        well_formed = z.msg_more(&peer) and _recv_frame(&header, net, 0) == 0
    if well_formed and z.msg_more(&header):
        well_formed = _recv_frame(&body, net, 0) == 0
        if well_formed and z.msg_more(&body):
            rest = z.msg_size(&body)
            rest += _discard_rest(net, &body)
            well_formed = False
    who, who_len = z.msg_data(&peer), z.msg_size(&peer)
    if not router:
        number = z.msg_gets(&header, b"__fd")
        dial.number = atoi(number) if number != NULL else -1
    if secure:
        who_len = _name_peer(name, &peer, &header)
        who = name
    if not well_formed:  # told to the sink as a frame without a header, which it counts and logs
        rest += z.msg_size(&header)
        sink.deliver(sink.self, _now_ms(), who, who_len, NULL, 0, NULL, rest, NULL, NULL)
        _note(notes, &header, SINK_DROP)
    else:
        kept = <Msg*> malloc(sizeof(Msg))
        if kept != NULL:
            z.msg_init(kept)
            z.msg_move(kept, &body)
            verdict = sink.deliver(sink.self, _now_ms(), who, who_len,
                                   z.msg_data(&header), z.msg_size(&header),
                                   z.msg_data(kept), z.msg_size(kept), kept, _release_in)
            if verdict != SINK_TAKEN:
                _release_in(kept)
            _note(notes, &header, verdict)
    z.msg_close(&peer)
    z.msg_close(&header)
    z.msg_close(&body)
    return 1


cdef int _command(void* net, void* commands, bint router, Dial* dial, FcSink* sink) noexcept nogil:
    """Carry out one command: 1 done, 0 nothing there, -1 quit."""
    cdef Msg verb, frame
    cdef int more, result = 1, ok
    cdef bint dials
    cdef size_t size = 0
    z.msg_init(&verb)
    if _recv_frame(&verb, commands, ZMQ_DONTWAIT) != 0:
        result = 0 if z.zmq_errno() == EAGAIN else -1
        z.msg_close(&verb)
        return result
    if z.msg_size(&verb) == 1 and (<char*> z.msg_data(&verb))[0] == c"Q":
        result = -1
    dials = z.msg_size(&verb) == 1 and (<char*> z.msg_data(&verb))[0] == c"D"
    z.msg_init(&frame)
    more = z.msg_more(&verb)
    ok = 1
    cdef bint is_peer = True
    while more:
        if _recv_frame(&frame, commands, 0) != 0:
            result = -1
            break
        more = z.msg_more(&frame)
        if dials:
            _dial(net, dial, <const char*> z.msg_data(&frame), z.msg_size(&frame), sink)
            continue
        if is_peer and not router:
            is_peer = False
            continue
        is_peer = False
        size += z.msg_size(&frame)
        if ok and z.msg_send(&frame, net, ZMQ_DONTWAIT | (ZMQ_SNDMORE if more else 0)) < 0:
            ok = 0  # the peer is gone; drop the rest of its message
    if size > 0 and not router:
        sink.sent(sink.self, _now_ms(), size)
    z.msg_close(&frame)
    z.msg_close(&verb)
    return result


cdef void _loop(void* net, void* commands, void* inbox, bint router, bint secure, Notes notes,
                FcSink* sink) noexcept nogil:
    cdef PollItem items[3]
    cdef FcOut out
    cdef int64_t wait
    cdef int got, i
    cdef Dial dial
    dial.endpoint[0] = 0
    dial.number = -1
    dial.looked_ms = 0
    _send_copy(inbox, b"E", 1, 0)
    while True:
        wait = sink.tick(sink.self, _now_ms())
        while sink.next_out(sink.self, _now_ms(), &out):
            _send_out(net, router, secure, &out, sink)
        if sink.has_event(sink.self):
            _send_copy(inbox, b"E", 1, 0)
        if dial.endpoint[0] != 0:
            _look(&dial, sink)
            if sink.silent(sink.self, _now_ms()):
                _dial(net, &dial, dial.endpoint, 0, sink)
                continue  # there is something to ask for
        items[0].socket = net
        items[1].socket = commands
        items[2].socket = NULL
        for i in range(3):
            items[i].fd = sink.wake_fd
            items[i].events = ZMQ_POLLIN
            items[i].revents = 0
        if z.poll(items, 3 if sink.wake_fd >= 0 else 2, <long> wait) < 0 and z.zmq_errno() != EINTR:
            return
        if items[2].revents & ZMQ_POLLIN:
            sink.clear_wake(sink.self)
        if items[1].revents & ZMQ_POLLIN:
            got = 1
            while got == 1:
                got = _command(net, commands, router, &dial, sink)
            if got < 0:
                return
        if items[0].revents & ZMQ_POLLIN:
            for i in range(BATCH):
                got = _pump_in(net, router, secure, notes, &dial, sink)
                if got < 0:
                    return
                if got == 0:
                    break


def run(capsule, size_t net, size_t commands, size_t inbox, bint router, bint secure,
        unsigned char[::1] heard=None, unsigned char[::1] moved=None, unsigned int[::1] owners=None):
    """Pump frames until a quit command comes; blocks without the GIL.

    Args:
        capsule: ``Exchange.capsule()``, which must outlive the call.
        net, commands, inbox: ``Socket.underlying`` of the three sockets.
        router: whether ``net`` is a ROUTER, whose frames begin with the peer's routing id.
        secure: whether such a peer is known by its user as well; only with ``router``.
        heard: where to note of each connection, by its file number, that it was understood or may go.
        moved: where to note that a message of it was whole; as long as ``heard``.
        owners: where to note whose it is; as long as ``heard``.
    """
    global release_out
    cdef FcSink* sink = <FcSink*> PyCapsule_GetPointer(capsule, b"fedcore.sink.v5")
    release_out = sink.out_done
    cdef Notes notes
    notes.count = 0 if heard is None else heard.shape[0]
    assert notes.count == 0 or moved.shape[0] == owners.shape[0] == heard.shape[0]
    notes.of = &heard[0] if notes.count else NULL
    notes.moved = &moved[0] if notes.count else NULL
    notes.owners = &owners[0] if notes.count else NULL
    with nogil:
        _loop(<void*> net, <void*> commands, <void*> inbox, router, secure, notes, sink)
