/* The C interface between the frame pump (fedcore/_pump.pyx) and the core (exchange.hpp).
 *
 * A pump moves frames and knows nothing about them; a sink knows what they mean and does no I/O.
 * All functions may be called without the GIL, none blocks for longer than the reduction of one
 * chunk, and none throws. All functions of one sink are called by one pump thread, but `out_done`
 * and the `release` that deliver is given, which any thread may call.
 */
#ifndef FEDCORE_SINK_H
#define FEDCORE_SINK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FC_SINK_CAPSULE "fedcore.sink.v5"

enum {
  FC_DONE = 0,    /* handled; the caller frees the owner */
  FC_TAKEN = 1,   /* the sink keeps the body and calls release(owner) later */
  FC_DROP = 3,    /* malformed, or too much; the caller frees the owner */
  FC_UNHEARD = 4, /* as FC_DROP, and the peer is not heard at present: its connection may go */
  FC_MUTED = 5    /* as FC_UNHEARD, but the peer is being told why: its connection may go soon */
};

/* A message that is no frame is delivered with header_len 0, no body, and its bytes as body_len.
 *
 * A frame to send. `peer` (empty at a site) and `header` (48 bytes) are valid until the next call
 * of next_out; `body` until out_done(owner). A frame without a body has body_len 0. */
typedef struct FcOut {
  const uint8_t* peer;
  size_t peer_len;
  const uint8_t* header;
  const void* body;
  size_t body_len;
  void* owner;
} FcOut;

typedef struct FcSink {
  void* self;
  int (*deliver)(void* self, int64_t now_ms, const void* peer, size_t peer_len, const void* header,
                 size_t header_len, const void* body, size_t body_len, void* owner,
                 void (*release)(void* owner));
  int (*next_out)(void* self, int64_t now_ms, FcOut* out); /* 1: filled, 0: nothing to send */
  void (*out_done)(void* owner);               /* the body was sent or dropped; owner may be NULL */
  int64_t (*tick)(void* self, int64_t now_ms); /* runs timers; ms until the next one, -1: none */
  int (*has_event)(void* self);                /* 1: Python should be told to fetch events */
  int wake_fd; /* readable when next_out, which had nothing, may have something; -1: never */
  void (*clear_wake)(void* self);
  void (*unreachable)(void* self, const void* peer, size_t peer_len); /* not connected at present */
  /* Of a site's one connection. */
  int (*silent)(void* self, int64_t now_ms);   /* 1: it carries nothing; dial another one */
  void (*dialled)(void* self, int64_t now_ms); /* another one was dialled */
  void (*sent)(void* self, int64_t now_ms, size_t bytes); /* a control message */
  /* The bytes that the system has received so far, and those sent that are acknowledged; -1:
   * unknown */
  void (*moved)(void* self, int64_t now_ms, int64_t received, int64_t acked);
} FcSink;

#ifdef __cplusplus
}
#endif

#endif
