/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_meeting.h
 * A block of queries meets a block of keys, in attention's backward on CPUs.
 */
#ifndef SEBP_CPU_ATTENTION_MEETING_H
#define SEBP_CPU_ATTENTION_MEETING_H

#include "attention_work.h"

enum { SEBP_MAX_SLIVERS = 64 };

/** Scratch memory of one worker. */
typedef struct sebp_backward_worker {
    float *k, *v;                /* k_block x d */
    float *q, *dout;             /* block of queries x d; Q scaled */
    float *q_lanes, *dout_lanes; /* packed slivers of B: lanes are queries */
    float *p, *ds;               /* P^T, dS^T: k_block rows, sebp_score_stride() apart */
    float *lse, *delta;
    float *dk, *dv; /* k_block x d */
    float *dq;      /* dQ^T: slivers x d x lanes, of a block or of whole texts */
    float *dbias;   /* as ds */
    float *bias, *factor;
    sebp_held_dropout dropout;
} sebp_backward_worker;

/** Queries of a head and keys that meet; their tiles, for each sliver. */
typedef struct sebp_meeting {
    int64_t text, head;
    sebp_span queries, keys;
    int64_t slivers;
    sebp_span tiles[SEBP_MAX_SLIVERS];
} sebp_meeting;

/** Lays out a worker whose dQ has as many slivers. */
sebp_backward_worker sebp_backward_lay_out(const sebp_attention_job *job, int64_t dq_slivers,
                                           sebp_room *room);

/** Floats from a row of scores to the next: not a power of two, whose rows would meet in the same few
 * places of a cache. */
static inline int64_t sebp_score_stride(const sebp_attention_job *job)
{
    return job->slivers * job->lanes + 16;
}

/** The block of keys, or of queries, of a text from `first` on. */
sebp_span sebp_keys_from(const sebp_attention_job *job, int64_t text, int64_t first);
sebp_span sebp_queries_from(const sebp_attention_job *job, int64_t text, int64_t first);

/** False where no query of them sees any of the keys. */
bool sebp_meet(const sebp_attention_job *job, int64_t text, int64_t head, sebp_span queries,
               sebp_span keys, sebp_meeting *at);

/** Loads K and V of a block of keys. */
void sebp_meeting_load_keys(const sebp_attention_job *job, int64_t text, int64_t kv_head,
                            sebp_span keys, const sebp_backward_worker *own);

/** Loads Q, dout, lse and delta of a meeting. */
void sebp_meeting_load_queries(const sebp_attention_job *job, const sebp_meeting *at,
                               const sebp_backward_worker *own);

/** The keys that a sliver of a meeting needs, counted from the first. */
sebp_span sebp_sliver_keys(const sebp_attention_job *job, const sebp_meeting *at, int64_t sliver);

/** P^T and dS^T of those tiles that are seen. */
void sebp_meeting_scores(const sebp_attention_job *job, const sebp_meeting *at,
                         sebp_backward_worker *own, bool of_bias);

/** dQ^T += K^T dS^T: d x lanes, in the slivers from `dq` on. */
void sebp_meeting_add_dq(const sebp_attention_job *job, const sebp_meeting *at,
                         const sebp_backward_worker *own, float *dq);

/** dV += P^T dout, dK += dS^T Q: keys x d; those that are wanted. */
void sebp_meeting_add_dkv(const sebp_attention_job *job, const sebp_meeting *at,
                          const sebp_backward_worker *own);

#endif
