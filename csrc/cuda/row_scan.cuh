// The scan over the tokens of rows that all recurrent operators share, for many rows and for few long ones.
//
// An operator is a struct Op with
//   scalar_t, acc_t, kRightToLeft     its types and the direction of its recurrence
//   kBlocksPerSm                      that the registers of the kernel for many rows must leave room for
//   kReduces                          whether finish_block uses the done counter
//   rows(), Row, row(index)           how many rows, and what a thread keeps of the one that it works on
//   row_chunking(row), discount_of(row)
//   place(ticket, look_back)          which segment of which row a ticket stands for; called by whole warps
//   Items                             what a thread holds of kItems<scalar_t> consecutive tokens
//   first_row(row)                    a row pointer whose alignment stands for all
//   initial(row)                      the carry before the first token in scan order
//   load(row, first, items)           fill Items from tokens first ... first + kItems - 1; outside the row: masked
//   valid(items, i), step(row, items, i, h)   the recurrence of token i
//   Output, visit(row, items, i, h, output)   use the carry h that token i receives
//   start_block()                     called by every thread of a block at its beginning
//   finish_chunk(row, first, items, output)  write what visit left
//   finish_row(row, h)                the carry after the last token, called by one thread
//   finish_team<kTeamWarps>(row, output)  the same moment, called by every thread of a team that walks along whole rows
//   finish_block(index, output)       called by every thread of a block at its end
//
// Every order of evaluation depends on shape and alignment alone, so the result has the same bits from run to run.
#pragma once

#include <algorithm>

#include "../kernels/scan.h"
#include "items.cuh"

namespace lambda_return::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kFullMask = 0xffffffffu;

// ---- scans over the threads that share a row ----

template <class acc_t>
__device__ __forceinline__ AffineMap<acc_t> shuffle_up(const AffineMap<acc_t>& map, int delta) {
  return {__shfl_up_sync(kFullMask, map.a, delta), __shfl_up_sync(kFullMask, map.b, delta)};
}

template <class acc_t>
__device__ __forceinline__ AffineMap<acc_t> shuffle(const AffineMap<acc_t>& map, int lane) {
  return {__shfl_sync(kFullMask, map.a, lane), __shfl_sync(kFullMask, map.b, lane)};
}

// Warp totals of one tile. Two buffers in turn, so that one barrier a tile is enough: a warp can only reach the next
// write to a buffer through the barrier after the tile in between, which every warp reaches after its reads.
template <class acc_t>
struct TeamTotals {
  AffineMap<acc_t> buffer[2][kWarps];
};

// For the kTeamWarps warps that share a row, in scan order by rank: before <- the composition of the maps of all
// threads of lower rank, total <- that of all threads. parity alternates from call to call.
template <int kTeamWarps, class acc_t>
__device__ __forceinline__ void scan_team(
    const AffineMap<acc_t>& mine, const AffineRule<acc_t>& rule, TeamTotals<acc_t>& totals, int parity,
    AffineMap<acc_t>& before, AffineMap<acc_t>& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % kTeamWarps;
  AffineMap<acc_t> inclusive = mine;
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const AffineMap<acc_t> other = shuffle_up(inclusive, delta);
    if (lane >= delta + (planted(Bug::kWrongLaneInScan) ? 1 : 0)) inclusive = rule.compose(inclusive, other);
  }
  before = shuffle_up(inclusive, 1);
  if (lane == 0) before = AffineMap<acc_t>::identity();
  total = shuffle(inclusive, kWarp - 1);
  if constexpr (kTeamWarps > 1) {
    AffineMap<acc_t>* slots = totals.buffer[planted(Bug::kNoBarrierBeforeTotalsAreReused) ? 0 : parity];
    if (lane == 0) slots[warp] = total;
    if (!planted(Bug::kNoBarrierBeforeTotalsAreRead)) __syncthreads();
    AffineMap<acc_t> folded = AffineMap<acc_t>::identity();
#pragma unroll
    for (int w = 0; w < kTeamWarps; ++w) {
      if (w == warp) before = rule.compose(before, folded);
      folded = rule.compose(slots[w], folded);
    }
    total = folded;
  }
}

// ---- one thread's items ----

// The chunk that stands at place `chunk` in scan order begins at this token of the row.
template <class Op>
__device__ __forceinline__ int64_t first_token(int64_t chunk, int64_t chunks, int head) {
  constexpr int N = kItems<typename Op::scalar_t>;
  return (Op::kRightToLeft ? chunks - 1 - chunk : chunk) * N - head;
}

// Calls body(i) for a thread's items in scan order.
template <class Op, class Body>
__device__ __forceinline__ void for_items(const Body& body) {
  constexpr int N = kItems<typename Op::scalar_t>;
#pragma unroll
  for (int k = 0; k < N; ++k) body(Op::kRightToLeft ? N - 1 - k : k);
}

template <class Op>
__device__ __forceinline__ AffineMap<typename Op::acc_t> map_of(
    const Op& op, const typename Op::Row& row, const typename Op::Items& items) {
  using acc_t = typename Op::acc_t;
  auto map = AffineMap<acc_t>::identity();
  for_items<Op>([&](int i) {
    if (op.valid(items, i)) map.then(op.discount_of(row), [&](acc_t h) { return op.step(row, items, i, h); });
  });
  return map;
}

template <class Op>
__device__ __forceinline__ void visit_items(
    const Op& op, const typename Op::Row& row, const typename Op::Items& items, typename Op::acc_t h,
    typename Op::Output& output) {
  for_items<Op>([&](int i) {
    op.visit(row, items, i, h, output);
    if (op.valid(items, i)) h = op.step(row, items, i, h);
  });
}

// ---- many rows: a team of warps walks along its row in tiles, carrying H ----

template <class Op, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, Op::kBlocksPerSm) scan_rows(const Op op) {
  using acc_t = typename Op::acc_t;
  constexpr int N = kItems<typename Op::scalar_t>;
  constexpr int kTeams = kWarps / kTeamWarps;
  __shared__ TeamTotals<acc_t> totals;
  const int rank = threadIdx.x % (kTeamWarps * kWarp);
  op.start_block();
  typename Op::Output output{};
  int parity = 0;
  acc_t carry{};

  for (int64_t index = blockIdx.x * int64_t(kTeams) + threadIdx.x / (kTeamWarps * kWarp); index < op.rows();
       index += gridDim.x * int64_t(kTeams)) {
    const typename Op::Row row = op.row(index);
    const AffineRule<acc_t> rule(op.discount_of(row));
    const int head = op.row_chunking(row).template head<N>(op.first_row(row));
    const int64_t chunks = op.row_chunking(row).template chunks<N>(head);
    if (!planted(Bug::kCarryNotResetBetweenRows) || index < gridDim.x * int64_t(kTeams)) carry = op.initial(row);
    for (int64_t tile = 0; tile < chunks; tile += kTeamWarps * kWarp) {
      const int64_t first = first_token<Op>(tile + rank, chunks, head);
      typename Op::Items items;
      op.load(row, first, items);
      AffineMap<acc_t> before, total;
      scan_team<kTeamWarps>(map_of(op, row, items), rule, totals, parity, before, total);
      parity ^= 1;
      visit_items(op, row, items, rule.apply(before, carry), output);
      carry = rule.apply(total, carry);
      op.finish_chunk(row, first, items, output);
    }
    if (rank == 0) op.finish_row(row, carry);
    op.template finish_team<kTeamWarps>(row, output);
  }
  op.finish_block(blockIdx.x, output);
}

// ---- few long rows: a block takes a segment of tiles, and finds its carry by looking back ----

// What segments tell one another. Segment s of a row publishes its map as soon as it has read its tokens
// (kMap), and its outgoing carry once it knows the incoming one (kCarry). Only ticket and flags are cleared before.
template <class acc_t>
struct LookBack {
  static constexpr unsigned kNothing = 0, kMap = 1, kCarry = 2;

  unsigned* ticket;
  unsigned* flags;  // of every segment; so are the maps and carries
  AffineMap<acc_t>* maps;
  acc_t* carries;
  int64_t segments;  // of one row; of packed rows: of all sequences
  int64_t tiles;     // of one segment

  // The carry that a segment > 0 of a row receives, in every lane of the calling warp; `first` is the index of the
  // row's segment 0. Walks back to the nearest segment whose carry is known, then folds the maps in between onto it
  // *one at a time in order*. A published carry is the result of the very same folds, so it does not matter how far
  // back the walk went: same bits in any schedule.
  __device__ __forceinline__ acc_t carry_into(int64_t first, int64_t segment, const AffineRule<acc_t>& rule) const {
    const int lane = threadIdx.x % kWarp;
    int64_t known = -1;
    for (int64_t nearest = segment - 1; known < 0; nearest -= kWarp) {
      const int64_t other = nearest - lane;
      unsigned flag = kNothing;
      if (other >= 0) {
        // The walk ends at segment 0 at the latest. It publishes no map, but where cu_seqlens is not in order its place
        // may be another row's, which does.
        const unsigned least = other == 0 ? kCarry : kMap;
        while ((flag = load_acquire(flags + first + other)) < least) __nanosleep(32);
      }
      const unsigned carries_known = __ballot_sync(kFullMask, flag == kCarry);
      if (carries_known != 0) known = nearest - (__ffs(static_cast<int>(carries_known)) - 1);
    }
    __syncwarp();  // what one lane acquired, every lane may read

    acc_t carry = carries[first + known];
    for (int64_t begin = known + 1; begin < segment; begin += kWarp) {
      const int64_t count = segment - begin < kWarp ? segment - begin : kWarp;
      const AffineMap<acc_t> mine = lane < count ? maps[first + begin + lane] : AffineMap<acc_t>::identity();
      for (int i = 0; i < count; ++i) carry = rule.apply(shuffle(mine, i), carry);
    }
    return carry;
  }

  __device__ __forceinline__ void publish_map(int64_t index, const AffineMap<acc_t>& map) const {
    maps[index] = map;
    store_release(flags + index, kMap);
  }
  __device__ __forceinline__ void publish_carry(int64_t index, acc_t carry) const {
    carries[index] = carry;
    store_release(flags + index, kCarry);
  }
};

// What a ticket stands for. Whoever holds a ticket knows that all lower ones are taken by blocks that run or are done,
// so waiting for them ends: the segments of a row have ascending tickets.
struct Place {
  int64_t row, segment;
  int64_t first;  // index of the row's segment 0 among the flags
  bool is_used;   // the upper bound that the grid has may be more than what packed rows need
  bool is_last;   // segment of its row
};

template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    scan_long_rows(const Op op, const LookBack<typename Op::acc_t> look_back) {
  using acc_t = typename Op::acc_t;
  constexpr int N = kItems<typename Op::scalar_t>;
  __shared__ TeamTotals<acc_t> totals;
  __shared__ unsigned shared_ticket;
  __shared__ acc_t shared_carry;
  if (threadIdx.x == 0) shared_ticket = fetch_add_acq_rel(look_back.ticket, 1);
  op.start_block();
  __syncthreads();
  const Place place = op.place(shared_ticket, look_back);
  const int64_t segment = place.segment, index = place.first + segment;
  typename Op::Output output{};
  if (!place.is_used) {
    if (threadIdx.x == 0) look_back.publish_carry(index, acc_t(0));
    op.finish_block(index, output);
    return;
  }

  const typename Op::Row row = op.row(place.row);
  const AffineRule<acc_t> rule(op.discount_of(row));
  const int head = op.row_chunking(row).template head<N>(op.first_row(row));
  const int64_t chunks = op.row_chunking(row).template chunks<N>(head);
  const auto first_of = [&](int64_t tile) {
    return first_token<Op>((segment * look_back.tiles + tile) * kThreads + threadIdx.x, chunks, head);
  };
  typename Op::Items items;
  AffineMap<acc_t> before, total, map = AffineMap<acc_t>::identity();
  int parity = 0;
  const auto scan_tile = [&](int64_t tile) {
    op.load(row, first_of(tile), items);
    scan_team<kWarps>(map_of(op, row, items), rule, totals, parity, before, total);
    parity ^= 1;
  };

  for (int64_t tile = 0; tile < look_back.tiles; ++tile) {
    scan_tile(tile);
    map = rule.compose(total, map);
  }
  if (threadIdx.x < kWarp) {
    acc_t carry;
    if (segment == 0) {
      carry = op.initial(row);
    } else {
      if (threadIdx.x == 0) look_back.publish_map(index, map);
      carry = look_back.carry_into(place.first, segment, rule);
    }
    if (threadIdx.x == 0) {
      const acc_t outgoing = rule.apply(map, carry);
      look_back.publish_carry(index, outgoing);
      if (place.is_last) op.finish_row(row, outgoing);
      shared_carry = carry;
    }
  }
  __syncthreads();

  acc_t carry = shared_carry;
  for (int64_t tile = 0; tile < look_back.tiles; ++tile) {
    if (look_back.tiles > 1) scan_tile(tile);  // a segment of one tile still has it in registers
    visit_items(op, row, items, rule.apply(before, carry), output);
    carry = rule.apply(total, carry);
    op.finish_chunk(row, first_of(tile), items, output);
  }
  op.finish_block(index, output);
}

// ---- operators without a sum, and operators whose rows are alike ----

struct NoRowSums {
  __device__ void start_block() const {}
  template <int kTeamWarps, class Row, class Output>
  __device__ void finish_team(const Row&, const Output&) const {}
};

struct NoReduction : NoRowSums {
  static constexpr bool kReduces = false;
  template <class Output>
  __device__ void finish_block(int64_t, const Output&) const {}
};

// B rows of the same length under the same discount.
template <class acc_t>
struct EqualRows {
  using Row = int64_t;
  static constexpr int kBlocksPerSm = 4;

  int64_t B;
  Chunking chunking;
  Discount<acc_t> discount;

  __device__ int64_t rows() const { return B; }
  __device__ Row row(int64_t index) const { return index; }
  __device__ const Chunking& row_chunking(Row) const { return chunking; }
  __device__ const Discount<acc_t>& discount_of(Row) const { return discount; }
  // The rows take turns, so that all of them advance together.
  __device__ Place place(unsigned ticket, const LookBack<acc_t>& look_back) const {
    const int64_t segment = ticket / B, row = ticket % B;
    return {row, segment, row * look_back.segments, true, segment == look_back.segments - 1};
  }
};

// ---- which of them, from the shape alone ----

// Blocks of 256 threads that fill a large GPU (132 SMs x 4). Fewer teams than that starve it.
constexpr int64_t kBlocksToFill = 512;
// At most this many blocks for many rows: each loops over rows, and a loss leaves one partial sum a block.
constexpr int64_t kMaxBlocks = 4096;
// Done counter, ticket and flags fit in 64 KiB.
constexpr int64_t kMaxSegments = 16382;

struct ScanPlan {
  enum Kind { kWarpPerRow, kBlockPerRow, kLongRows } kind;
  int64_t blocks;
  int64_t segments = 0, tiles = 0;  // of kLongRows: see LookBack

  // B rows of T tokens; items = kItems of the value type.
  //  * warp per row: a row is short enough for a few tiles of a warp, or there are warps enough anyway;
  //  * block per row: fewer, longer rows, enough of them to fill the chip;
  //  * long rows: not even that; one row must fill many blocks. A segment is one tile, kept in registers, unless that
  //    makes too many flags.
  static ScanPlan of(int64_t B, int64_t T, int items) {
    const int64_t block_tile = int64_t(kThreads) * items;
    if (T > 2 * block_tile && 0 < B && B < kBlocksToFill) {
      const int64_t tiles_of_row = (T + items - 1 + block_tile - 1) / block_tile;  // with a head of items - 1
      const int64_t max_segments = kMaxSegments / B;                               // of one row
      const int64_t tiles = (tiles_of_row + max_segments - 1) / max_segments;
      const int64_t segments = (tiles_of_row + tiles - 1) / tiles;
      return {kLongRows, segments * B, segments, tiles};
    }
    return many_rows(B, T, items);
  }

  // B sequences of `total` tokens in all, each `outputs` times. Their lengths are known on the device alone: where
  // there are too few sequences to fill the chip, any of them may be long; else the average decides.
  static ScanPlan of_packed(int64_t B, int64_t total, int64_t outputs, int items) {
    const int64_t block_tile = int64_t(kThreads) * items, rows = B * outputs;
    if (total > 2 * block_tile && 0 < rows && rows < kBlocksToFill) {
      const int64_t max_whole = kMaxSegments / outputs - 2 * B;  // segments but for what the ends of sequences take
      const int64_t tiles = (total / max_whole + block_tile) / block_tile;
      const int64_t segments = packed_segments(B, total, tiles * block_tile, items);
      return {kLongRows, segments * outputs, segments, tiles};
    }
    return many_rows(rows, B == 0 ? 0 : (total + B - 1) / B, items);
  }

  // Where the segments of sequence b begin, among those of all sequences, if it begins at token `begin`. The next one
  // begins at least as many further as it needs, ceil((length + items - 1) / segment_tokens), and at least one: floors
  // of sums are no less than sums of floors. For b = B and begin = total: all of them.
  LAMBDA_RETURN_HOST_DEVICE static int64_t packed_segments(
      int64_t b, int64_t begin, int64_t segment_tokens, int items) {
    return (begin + b * (segment_tokens + items - 2)) / segment_tokens;
  }

  // Bytes of workspace: first those that must be cleared (a done counter, a ticket, the flags), then the rest.
  int64_t bytes_to_clear() const { return (kind == kLongRows ? 2 + segments_in_all() : 1) * int64_t(sizeof(unsigned)); }
  template <class acc_t>
  int64_t workspace_bytes() const {
    return align(bytes_to_clear()) +
           (kind == kLongRows ? segments_in_all() * int64_t(sizeof(AffineMap<acc_t>) + sizeof(acc_t)) : 0);
  }

  // The done counter of a loss is the first word of the workspace.
  template <class acc_t>
  LookBack<acc_t> look_back(void* workspace) const {
    auto* words = static_cast<unsigned*>(workspace);
    auto* maps = reinterpret_cast<AffineMap<acc_t>*>(static_cast<char*>(workspace) + align(bytes_to_clear()));
    return {words + 1, words + 2, maps, reinterpret_cast<acc_t*>(maps + segments_in_all()), segments, tiles};
  }

 private:
  static ScanPlan many_rows(int64_t B, int64_t T, int items) {
    const bool is_short = T <= 2 * int64_t(kWarp) * items || B >= kWarps * kBlocksToFill;
    const int64_t blocks = is_short ? (B + kWarps - 1) / kWarps : B;
    return {is_short ? kWarpPerRow : kBlockPerRow, std::clamp(blocks, int64_t(1), kMaxBlocks)};
  }
  int64_t segments_in_all() const { return blocks; }
  static int64_t align(int64_t bytes) { return (bytes + 15) / 16 * 16; }
};

// Launches the scan of op. workspace has plan.workspace_bytes<acc_t>() bytes on a 16-byte boundary.
template <class Op>
void launch_scan(const Op& op, const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.kind == ScanPlan::kLongRows || Op::kReduces) clear_async(workspace, plan.bytes_to_clear(), stream);
  switch (plan.kind) {
    case ScanPlan::kWarpPerRow:
      LAMBDA_RETURN_LAUNCH((scan_rows<Op, 1>), plan.blocks, kThreads, stream, op);
      break;
    case ScanPlan::kBlockPerRow:
      LAMBDA_RETURN_LAUNCH((scan_rows<Op, kWarps>), plan.blocks, kThreads, stream, op);
      break;
    case ScanPlan::kLongRows: {
      const auto look_back = plan.look_back<typename Op::acc_t>(workspace);
      LAMBDA_RETURN_LAUNCH((scan_long_rows<Op>), plan.blocks, kThreads, stream, op, look_back);
      break;
    }
  }
}

}  // namespace lambda_return::cuda
