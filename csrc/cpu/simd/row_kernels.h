// The kernels of one instruction set: a stretch of one row each. What they compute is said in csrc/kernels.
//
// No include guard: included once for each instruction set, under its target, inside an unnamed namespace, after
//   constexpr int kLanes            float32 lanes
//   LAMBDA_RETURN_FMA               1 where the target has the x86 FMA and F16C instructions
//   LAMBDA_RETURN_AVX512            1 where it has AVX-512 F
#include "vector.h"

#include "row_scan.h"

template <class scalar_t>
using accumulate_of = typename RowKernels<scalar_t>::acc_t;

// Lanes of float64 rows: as wide a register, but no fewer than one group of four.
constexpr int kDoubleLanes = kLanes / 2 < 4 ? 4 : kLanes / 2;
template <class scalar_t>
constexpr int lanes_of = sizeof(accumulate_of<scalar_t>) == 8 ? kDoubleLanes : kLanes;

template <class scalar_t>
ScanConstants<accumulate_of<scalar_t>> scan_constants(Discount<accumulate_of<scalar_t>> discount, Prefetch prefetch) {
  using acc_t = accumulate_of<scalar_t>;
  constexpr int W = lanes_of<scalar_t>;
  ScanConstants<acc_t> constants{};
  constants.value = discount.value;
  constants.carry = discount.carry;
  constants.prefetch = prefetch;
  double power[W + 1];  // of c^4
  const double c = discount.carry;
  power[0] = 1;
  for (int chunks = 1; chunks <= W; ++chunks) {
    power[chunks] = power[chunks - 1] * (c * c * c * c);
  }
  for (int i = 0; 1 << i < W; ++i) {
    constants.power[i] = static_cast<acc_t>(power[1 << i]);
  }
  constants.tile = static_cast<acc_t>(power[W]);
  for (int lane = 0; lane < W; ++lane) {
    const int chunk = RowScan<acc_t, W, Direction::kRightToLeft, Terms::kBoth>::chunk_of(lane);
    constants.carry_in_reverse[lane] = static_cast<acc_t>(power[W - 1 - chunk]);
    constants.carry_in_forward[lane] = static_cast<acc_t>(power[chunk]);
  }
  return constants;
}

// ---- sinks: what becomes of a tile's tokens ------------------------------------------------------------------------
//
// at(t) is the sink of the tile that starts at token t. edge(t, count, run) calls run(sink) with the sink of a tile of
// which only the first count tokens exist. tile<kAll>(mask, valid, x) takes a tile in chunk order, where x are the
// carries that reach its tokens or, with kErrors, what their values differ from those by. skip() takes a tile without a
// valid token. prefetch(t) asks for what the tile that starts at token t will need.

// How far ahead of the scan memory is asked for. The operations of a tile depend on one another for so long that a
// processor does not get far enough ahead by itself to hide the way from memory.
constexpr int64_t kTilesAhead = 48;

// At from + t, which may lie outside of the array: a prefetch of what does not exist does nothing.
template <int kTile, class T>
LAMBDA_RETURN_INLINE void prefetch_tile(const T* from, int64_t t) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from) + t * sizeof(T);
  for (uintptr_t byte = 0; byte < kTile * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte));
  }
}

template <int kTile, class T>
struct EdgeBuffer {
  alignas(64) T data[kTile] = {};

  EdgeBuffer() = default;
  EdgeBuffer(const T* from, int64_t count) { std::memcpy(data, from, count * sizeof(T)); }
};

// Writes one vector of results a token.
template <class Scan, class scalar_t>
struct Output {
  scalar_t* out;

  LAMBDA_RETURN_INLINE Output at(int64_t t) const { return {out + t}; }
  template <class Run>
  LAMBDA_RETURN_INLINE void edge(int64_t t, int64_t count, const Run& run) const {
    EdgeBuffer<Scan::kTile, scalar_t> buffer;
    run(Output{buffer.data});
    std::memcpy(static_cast<void*>(out + t), buffer.data, count * sizeof(scalar_t));
  }
  LAMBDA_RETURN_INLINE void store_tile(typename Scan::V (&x)[4]) const { Scan::store_tile(out, x); }
  LAMBDA_RETURN_INLINE void skip() const { std::memset(static_cast<void*>(out), 0, Scan::kTile * sizeof(scalar_t)); }
};

struct NoSink {
  static constexpr bool kErrors = false;

  LAMBDA_RETURN_INLINE NoSink at(int64_t) const { return {}; }
  template <class Run>
  LAMBDA_RETURN_INLINE void edge(int64_t, int64_t, const Run& run) const {
    run(*this);
  }
  template <bool kAll, class V, class Mask>
  LAMBDA_RETURN_INLINE void tile(const uint8_t*, const Mask (&)[4], const V (&)[4]) const {}
  LAMBDA_RETURN_INLINE void skip() const {}
  LAMBDA_RETURN_INLINE void prefetch(int64_t) const {}
};

// G, or with weight the adjoint's dV = gamma (1 - lam) A.
template <class Scan, class scalar_t, bool kWeighted>
struct CarrySink {
  static constexpr bool kErrors = false;
  using V = typename Scan::V;
  using M = typename Scan::M;
  using Mask = typename Scan::Mask;
  Output<Scan, scalar_t> out;
  accumulate_of<scalar_t> weight;

  LAMBDA_RETURN_INLINE CarrySink at(int64_t t) const { return {out.at(t), weight}; }
  template <class Run>
  LAMBDA_RETURN_INLINE void edge(int64_t t, int64_t count, const Run& run) const {
    out.edge(t, count, [&](const auto& edge_out) LAMBDA_RETURN_INLINE_LAMBDA { run(CarrySink{edge_out, weight}); });
  }
  template <bool kAll>
  LAMBDA_RETURN_INLINE void tile(const uint8_t*, const Mask (&valid)[4], const V (&before)[4]) const {
    V x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = before[i];
      if constexpr (kWeighted) x[i] = drop(x[i] * weight, M{} - (weight == 0 ? 1 : 0));
      if constexpr (!kAll) x[i] = valid[i].keep(x[i]);
    }
    out.store_tile(x);
  }
  LAMBDA_RETURN_INLINE void skip() const { out.skip(); }
  LAMBDA_RETURN_INLINE void prefetch(int64_t) const {}
};

// What the two directions of the loss share: the second mask. kShared: it is the mask of the scan.
template <class Scan, bool kShared>
struct Attention {
  using Mask = typename Scan::Mask;
  const uint8_t* bytes;

  LAMBDA_RETURN_INLINE Attention at(int64_t t) const { return {kShared ? nullptr : bytes + t}; }
  template <class Run>
  LAMBDA_RETURN_INLINE void edge(int64_t t, int64_t count, const Run& run) const {
    if constexpr (kShared) {
      run(*this);
    } else {
      const EdgeBuffer<Scan::kTile, uint8_t> buffer(bytes + t, count);
      run(Attention{buffer.data});
    }
  }

  LAMBDA_RETURN_INLINE void prefetch(int64_t t) const {
    if constexpr (!kShared) prefetch_tile<Scan::kTile>(bytes, t);
  }

  // Calls body(all, num_tokens, counts): whether all tokens are valid in both masks, how many are, and which.
  template <bool kAll, class Body>
  LAMBDA_RETURN_INLINE void with_counts(const uint8_t* mask, const Mask (&valid)[4], const Body& body) const {
    using Bytes = typename Scan::Bytes;
    const Bytes of_scan = load_vector<Bytes>(mask),
                both = kShared ? of_scan : smaller(load_vector<Bytes>(bytes), of_scan);
    const int64_t num_tokens = kShared && kAll ? Scan::kTile : count_valid(both);
    if (kShared || num_tokens == (kAll ? Scan::kTile : count_valid(of_scan))) {
      body(std::bool_constant<kAll>(), num_tokens, valid);
    } else {
      Mask counts[4];
      Scan::load_mask(both, counts);
      body(std::false_type(), num_tokens, counts);
    }
  }
};

constexpr auto unchanged = [](auto x) LAMBDA_RETURN_INLINE_LAMBDA { return x; };

// f of x in float64, its two halves added where it is float32.
template <class F = decltype(unchanged)>
LAMBDA_RETURN_INLINE auto in_float64(Vector<double, kDoubleLanes> x, const F& f = unchanged) {
  return f(x);
}
#if LAMBDA_RETURN_FMA
template <class F = decltype(unchanged)>
LAMBDA_RETURN_INLINE auto in_float64(Vector<float, 8> x, const F& f = unchanged) {
  return f((Vector<double, 4>)_mm256_cvtps_pd((__m128)low_half(x))) +
         f((Vector<double, 4>)_mm256_cvtps_pd((__m128)high_half(x)));
}
#if LAMBDA_RETURN_AVX512
template <class F = decltype(unchanged)>
LAMBDA_RETURN_INLINE auto in_float64(Vector<float, 16> x, const F& f = unchanged) {
  return f((Vector<double, 8>)_mm512_cvtps_pd((__m256)low_half(x))) +
         f((Vector<double, 8>)_mm512_cvtps_pd((__m256)high_half(x)));
}
#else
template <class F = decltype(unchanged)>
LAMBDA_RETURN_INLINE auto in_float64(Vector<float, 16> x, const F& f = unchanged) {
  return in_float64(low_half(x), f) + in_float64(high_half(x), f);
}
#endif
#else
template <class F = decltype(unchanged)>
LAMBDA_RETURN_INLINE auto in_float64(Vector<float, 4> x, const F& f = unchanged) {
  return f(Vector<double, 2>{x[0], x[1]}) + f(Vector<double, 2>{x[2], x[3]});
}
#endif

template <class V>
LAMBDA_RETURN_INLINE double sum_of_lanes(V x) {
  if constexpr (sizeof(V) > 16) {
    return sum_of_lanes(low_half(x) + high_half(x));
  } else {
    return x[0] + x[1];
  }
}

template <class V>
LAMBDA_RETURN_INLINE void write_lanes(V squares, int64_t num_tokens, SquaredErrorLanes* error) {
  store_vector(error->sums, squares);
  for (int lane = sizeof(V) / sizeof(double); lane < SquaredErrorLanes::kLanes; ++lane) {
    error->sums[lane] = 0;
  }
  error->num_tokens = num_tokens;
}

// Squared errors, in the accumulation type over so few tiles that it loses next to nothing, and from there in float64.
// A tile's errors are squared when those of the next come: until then they would only wait, see RowScan::tile. (No
// loops: GCC would keep the arrays that they run over in memory.)
template <class Scan>
struct LossSums {
  using V = typename Scan::V;
  static constexpr int kTiles = 8;

  decltype(in_float64(V())) squares{};
  V recent[2] = {}, latest[4] = {};
  int recent_tiles = 0;
  int64_t num_tokens = 0;

  LAMBDA_RETURN_INLINE void add(const V (&errors)[4]) {
    square_latest();
    latest[0] = errors[0], latest[1] = errors[1], latest[2] = errors[2], latest[3] = errors[3];
    if (++recent_tiles == kTiles) flush();
  }
  LAMBDA_RETURN_INLINE void square_latest() {
    recent[0] = multiply_add(latest[0], latest[0], recent[0]);
    recent[1] = multiply_add(latest[1], latest[1], recent[1]);
    recent[0] = multiply_add(latest[2], latest[2], recent[0]);
    recent[1] = multiply_add(latest[3], latest[3], recent[1]);
  }
  LAMBDA_RETURN_INLINE void flush() {
    squares += in_float64(recent[0] + recent[1]);
    recent[0] = recent[1] = V{};
    recent_tiles = 0;
  }
  LAMBDA_RETURN_INLINE void write(SquaredErrorLanes* error) {
    square_latest();
    flush();
    write_lanes(squares, num_tokens, error);
  }
};

template <class Scan, bool kShared>
struct LossSink {
  static constexpr bool kErrors = true;
  using V = typename Scan::V;
  using Mask = typename Scan::Mask;
  Attention<Scan, kShared> attention;
  LossSums<Scan>& sums;

  LAMBDA_RETURN_INLINE LossSink at(int64_t t) const { return {attention.at(t), sums}; }
  template <class Run>
  LAMBDA_RETURN_INLINE void edge(int64_t t, int64_t count, const Run& run) const {
    attention.edge(
        t, count, [&](const auto& edge_attention) LAMBDA_RETURN_INLINE_LAMBDA { run(LossSink{edge_attention, sums}); });
  }
  template <bool kAll>
  LAMBDA_RETURN_INLINE void tile(const uint8_t* mask, const Mask (&valid)[4], const V (&errors)[4]) const {
    attention.template with_counts<kAll>(
        mask, valid, [&](auto all, int64_t num_tokens, auto& counts) LAMBDA_RETURN_INLINE_LAMBDA {
          V x[4];
          for (int i = 0; i < 4; ++i) {
            x[i] = errors[i];
            if constexpr (!all) x[i] = counts[i].keep(x[i]);
          }
          sums.add(x);
          sums.num_tokens += num_tokens;
        });
  }
  LAMBDA_RETURN_INLINE void skip() const {}
  LAMBDA_RETURN_INLINE void prefetch(int64_t t) const { attention.prefetch(t); }
};

template <class Scan, class scalar_t, bool kShared>
struct LossGradientSink {
  static constexpr bool kErrors = true;
  using V = typename Scan::V;
  using Mask = typename Scan::Mask;
  Attention<Scan, kShared> attention;
  Output<Scan, scalar_t> out;
  accumulate_of<scalar_t> scale;

  LAMBDA_RETURN_INLINE LossGradientSink at(int64_t t) const { return {attention.at(t), out.at(t), scale}; }
  template <class Run>
  LAMBDA_RETURN_INLINE void edge(int64_t t, int64_t count, const Run& run) const {
    attention.edge(t, count, [&](const auto& edge_attention) LAMBDA_RETURN_INLINE_LAMBDA {
      out.edge(t, count, [&](const auto& edge_out) LAMBDA_RETURN_INLINE_LAMBDA {
        run(LossGradientSink{edge_attention, edge_out, scale});
      });
    });
  }
  template <bool kAll>
  LAMBDA_RETURN_INLINE void tile(const uint8_t* mask, const Mask (&valid)[4], const V (&errors)[4]) const {
    attention.template with_counts<kAll>(mask, valid, [&](auto all, int64_t, auto& counts) LAMBDA_RETURN_INLINE_LAMBDA {
      V x[4];
      for (int i = 0; i < 4; ++i) {
        x[i] = errors[i] * scale;
        if constexpr (!all) x[i] = counts[i].keep(x[i]);
      }
      out.store_tile(x);
    });
  }
  LAMBDA_RETURN_INLINE void skip() const { out.skip(); }
  LAMBDA_RETURN_INLINE void prefetch(int64_t t) const { attention.prefetch(t); }
};

// ---- one stretch of a row -------------------------------------------------------------------------------------------

// One tile at values, mask.
template <class Scan, class scalar_t, class Sink>
LAMBDA_RETURN_INLINE void scan_tile(Scan& scan, const scalar_t* values, const uint8_t* mask, const Sink& sink) {
  const Fill fill = mask_fill<Scan::kTile>(mask);
  if (fill == Fill::kNone) {
    sink.skip();
    return;
  }
  typename Scan::V v[4], x[4];
  typename Scan::Mask valid[4];
  Scan::load_tile(values, v);
  if (fill == Fill::kAll) {
    scan.template tile<true, Sink::kErrors>(v, valid, x);
    sink.template tile<true>(mask, valid, x);
  } else {
    Scan::load_mask(load_vector<typename Scan::Bytes>(mask), valid);
    scan.template tile<false, Sink::kErrors>(v, valid, x);
    sink.template tile<false>(mask, valid, x);
  }
}

// values, mask [T], in the scan's direction: whole tiles from the end it starts at, then what is left.
template <class Scan, class scalar_t, class Sink>
LAMBDA_RETURN_INLINE AffineMap<accumulate_of<scalar_t>> scan_tiles(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* mask, int64_t T,
    accumulate_of<scalar_t> carry, const Sink& sink) {
  constexpr int kTile = Scan::kTile;
  const int64_t rest = T % kTile, tiles = T / kTile;
  const int64_t asking = constants.prefetch == Prefetch::kNone      ? 0
                         : constants.prefetch == Prefetch::kStretch ? tiles - kTilesAhead
                                                                    : tiles;
  Scan scan(constants, carry);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t t = Scan::kReverse ? T - (i + 1) * kTile : i * kTile;
    if (i < asking) {
      const int64_t ahead = Scan::kReverse ? t - kTilesAhead * kTile : t + kTilesAhead * kTile;
      prefetch_tile<kTile>(values, ahead);
      prefetch_tile<kTile>(mask, ahead);
      sink.prefetch(ahead);
    }
    scan_tile(scan, values + t, mask + t, sink.at(t));
  }
  if (rest > 0) {
    const int64_t t = Scan::kReverse ? 0 : T - rest;
    const EdgeBuffer<kTile, scalar_t> edge_values(values + t, rest);
    const EdgeBuffer<kTile, uint8_t> edge_mask(mask + t, rest);
    sink.edge(t, rest, [&](const auto& edge) LAMBDA_RETURN_INLINE_LAMBDA {
      scan_tile(scan, edge_values.data, edge_mask.data, edge);
    });
  }
  return scan.map();
}

// Calls body(Type<Scan>) with the scan for these constants.
template <class T>
struct Type {
  using type = T;
};
template <class scalar_t, Direction direction, class Body>
LAMBDA_RETURN_INLINE auto with_scan(const ScanConstants<accumulate_of<scalar_t>>& constants, const Body& body) {
  using acc_t = accumulate_of<scalar_t>;
  constexpr int W = lanes_of<scalar_t>;
  return constants.carry == 0   ? body(Type<RowScan<acc_t, W, direction, Terms::kNoCarry>>())
         : constants.value == 0 ? body(Type<RowScan<acc_t, W, direction, Terms::kCarryOnly>>())
                                : body(Type<RowScan<acc_t, W, direction, Terms::kBoth>>());
}

template <class scalar_t, Direction direction>
AffineMap<accumulate_of<scalar_t>> map_of(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* mask, int64_t T) {
  return with_scan<scalar_t, direction>(constants, [&](auto type) {
    using Scan = typename decltype(type)::type;
    return scan_tiles<Scan>(constants, values, mask, T, 0, NoSink{});
  });
}

template <class scalar_t>
AffineMap<accumulate_of<scalar_t>> lambda_return(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* mask, int64_t T,
    accumulate_of<scalar_t> carry, scalar_t* returns) {
  return with_scan<scalar_t, Direction::kRightToLeft>(constants, [&](auto type) {
    using Scan = typename decltype(type)::type;
    const CarrySink<Scan, scalar_t, false> sink{{returns}, 1};
    return scan_tiles<Scan>(constants, values, mask, T, carry, sink);
  });
}

template <class scalar_t>
AffineMap<accumulate_of<scalar_t>> lambda_return_backward(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* grad_returns, const uint8_t* mask,
    int64_t T, accumulate_of<scalar_t> carry, scalar_t* grad_values) {
  return with_scan<scalar_t, Direction::kLeftToRight>(constants, [&](auto type) {
    using Scan = typename decltype(type)::type;
    const CarrySink<Scan, scalar_t, true> sink{{grad_values}, constants.value};
    return scan_tiles<Scan>(constants, grad_returns, mask, T, carry, sink);
  });
}

template <class scalar_t, bool kShared>
AffineMap<accumulate_of<scalar_t>> lambda_value_loss_as(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* attention_mask,
    const uint8_t* loss_mask, int64_t T, accumulate_of<scalar_t> carry, SquaredErrorLanes* error) {
  return with_scan<scalar_t, Direction::kRightToLeft>(constants, [&](auto type) {
    using Scan = typename decltype(type)::type;
    LossSums<Scan> sums;
    const auto map =
        scan_tiles<Scan>(constants, values, loss_mask, T, carry, LossSink<Scan, kShared>{{attention_mask}, sums});
    sums.write(error);
    return map;
  });
}

template <class scalar_t>
AffineMap<accumulate_of<scalar_t>> lambda_value_loss(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* attention_mask,
    const uint8_t* loss_mask, int64_t T, accumulate_of<scalar_t> carry, SquaredErrorLanes* error) {
  const auto kernel =
      attention_mask == loss_mask ? lambda_value_loss_as<scalar_t, true> : lambda_value_loss_as<scalar_t, false>;
  return kernel(constants, values, attention_mask, loss_mask, T, carry, error);
}

template <class scalar_t, bool kShared>
AffineMap<accumulate_of<scalar_t>> lambda_value_loss_backward_as(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* attention_mask,
    const uint8_t* loss_mask, int64_t T, accumulate_of<scalar_t> carry, accumulate_of<scalar_t> scale,
    scalar_t* grad_values) {
  return with_scan<scalar_t, Direction::kRightToLeft>(constants, [&](auto type) {
    using Scan = typename decltype(type)::type;
    const LossGradientSink<Scan, scalar_t, kShared> sink{{attention_mask}, {grad_values}, scale};
    return scan_tiles<Scan>(constants, values, loss_mask, T, carry, sink);
  });
}

template <class scalar_t>
AffineMap<accumulate_of<scalar_t>> lambda_value_loss_backward(
    const ScanConstants<accumulate_of<scalar_t>>& constants, const scalar_t* values, const uint8_t* attention_mask,
    const uint8_t* loss_mask, int64_t T, accumulate_of<scalar_t> carry, accumulate_of<scalar_t> scale,
    scalar_t* grad_values) {
  const auto kernel = attention_mask == loss_mask ? lambda_value_loss_backward_as<scalar_t, true>
                                                  : lambda_value_loss_backward_as<scalar_t, false>;
  return kernel(constants, values, attention_mask, loss_mask, T, carry, scale, grad_values);
}

// ---- errors against targets from elsewhere --------------------------------------------------------------------------

// Calls body(t, errors, valid, count) on one vector of tokens after another, of which the first count exist.
template <class scalar_t, class target_t, class Body>
LAMBDA_RETURN_INLINE void for_errors(
    const scalar_t* values, const target_t* targets, const uint8_t* mask, int64_t T, const Body& body) {
  constexpr int W = lanes_of<scalar_t>;
  using Mask = TokenMask<accumulate_of<scalar_t>, W>;
  const auto step = [&](int64_t t, const scalar_t* v, const target_t* g, const uint8_t* m, int64_t count)
                        LAMBDA_RETURN_INLINE_LAMBDA {
                          const Mask valid = Mask::of(widen_bytes<W>(m), 0);
                          body(t, valid.keep(load<W>(v) - load<W>(g)), valid, count);
                        };
  int64_t t = 0;
  for (; t + W <= T; t += W) {
    step(t, values + t, targets + t, mask + t, W);
  }
  if (t < T) {
    const EdgeBuffer<W, scalar_t> v(values + t, T - t);
    const EdgeBuffer<W, target_t> g(targets + t, T - t);
    const EdgeBuffer<W, uint8_t> m(mask + t, T - t);
    step(t, v.data, g.data, m.data, T - t);
  }
}

template <class scalar_t, class target_t>
void masked_mse(
    const scalar_t* values, const target_t* targets, const uint8_t* mask, int64_t T, SquaredErrorLanes* error) {
  constexpr int W = lanes_of<scalar_t>;
  using V = Vector<accumulate_of<scalar_t>, W>;
  decltype(in_float64(V())) squares{};
  typename TokenMask<accumulate_of<scalar_t>, W>::Counter dropped;
  for_errors(values, targets, mask, T, [&](int64_t, V errors, auto valid, int64_t) LAMBDA_RETURN_INLINE_LAMBDA {
    squares += in_float64(errors * errors);
    dropped.add(valid);
  });
  write_lanes(squares, (T + W - 1) / W * W - dropped.dropped(), error);
}

template <class scalar_t, class target_t>
void masked_mse_backward(
    const scalar_t* values, const target_t* targets, const uint8_t* mask, int64_t T, accumulate_of<scalar_t> scale,
    scalar_t* grad_values) {
  constexpr int W = lanes_of<scalar_t>;
  using V = Vector<accumulate_of<scalar_t>, W>;
  for_errors(values, targets, mask, T, [&](int64_t t, V errors, auto, int64_t count) LAMBDA_RETURN_INLINE_LAMBDA {
    if (count == W) {
      store<W>(grad_values + t, errors * scale);
    } else {
      EdgeBuffer<W, scalar_t> edge;
      store<W>(edge.data, errors * scale);
      std::memcpy(static_cast<void*>(grad_values + t), edge.data, count * sizeof(scalar_t));
    }
  });
}

#include "elementary.h"

#include "token_loops.h"

#include "logit_loops.h"

template <class scalar_t>
constexpr RowKernels<scalar_t> row_kernels() {
  return {
      scan_constants<scalar_t>,
      map_of<scalar_t, Direction::kRightToLeft>,
      map_of<scalar_t, Direction::kLeftToRight>,
      lambda_return<scalar_t>,
      lambda_return_backward<scalar_t>,
      lambda_value_loss<scalar_t>,
      lambda_value_loss_backward<scalar_t>,
      masked_mse<scalar_t, scalar_t>,
      masked_mse<scalar_t, accumulate_of<scalar_t>>,
      masked_mse_backward<scalar_t, scalar_t>,
      masked_mse_backward<scalar_t, accumulate_of<scalar_t>>,
      widen_tokens<scalar_t>,
      narrow_tokens<scalar_t>,
      project_logits<scalar_t>,
      cross_entropies<scalar_t>,
      logit_gradients<scalar_t>,
  };
}

template <class acc_t>
constexpr TokenLoops<acc_t> token_loops() {
  return {
      head_values<acc_t>, recurrence_terms<acc_t>, finish_returns<acc_t>, finish_adjoint<acc_t>, token_losses<acc_t>,
  };
}

constexpr InstructionSet instruction_set_named(const char* name) {
  return {
      name,
      row_kernels<double>(),
      row_kernels<float>(),
      row_kernels<bfloat16_bits>(),
      row_kernels<float16_bits>(),
      token_loops<double>(),
      token_loops<float>(),
  };
}
