// The scan of one row, a tile at a time: what lambda_return.h says token by token, for 4 W tokens at once.
//
// No include guard: see vector.h.
//
// A tile is 4 W tokens in memory order: W chunks of 4 neighbours, one chunk a lane. Four vector loads and a 4 x 4
// transposition inside each group of four lanes put token i of every chunk into vector i, so that
//
//   vector i, lane 4 g + s   is token   W s + 4 g + i   of the tile, of chunk   k = s W/4 + g.
//
// Each lane first composes the maps of its own 4 tokens, the W maps are scanned across lanes in log2 W steps, and to
// the carry that then reaches its chunk each lane applies the maps of its first 0, 1, 2 and 3 tokens. Only one
// multiply-add a tile depends on the tile before it.

// Direction of time: a return looks at what comes later (right to left), its adjoint at what came before.
enum class Direction { kRightToLeft, kLeftToRight };

// Which coefficients are exactly 0: their terms are left out rather than multiplied by 0, see Discount.
enum class Terms { kBoth, kCarryOnly, kNoCarry };

template <class acc_t, int W, Direction direction, Terms terms>
struct RowScan {
  static constexpr int kTile = 4 * W;
  static constexpr bool kReverse = direction == Direction::kRightToLeft;
  using V = Vector<acc_t, W>;
  using M = Vector<lane_mask_t<acc_t>, W>;
  using Mask = TokenMask<acc_t, W>;
  using Bytes = Vector<uint8_t, kTile>;

  static constexpr int chunk_of(int lane) { return lane % 4 * (W / 4) + lane / 4; }
  static constexpr int lane_of(int chunk) { return chunk % (W / 4) * 4 + chunk / (W / 4); }

  // 4 x 4 transposition inside each group of four lanes, in two rounds: pairs of vectors, then pairs of lanes.
  template <int kRow>
  struct InterleaveIndex {  // kRow 0: lanes 0, 1 of both; 1: lanes 2, 3 of both
    static constexpr int at(int l) { return l / 4 * 4 + 2 * kRow + l % 4 / 2 + l % 2 * W; }
  };
  template <int kRow>
  struct PairIndex {  // kRow 0: lanes 0, 1 of a then of b; 1: lanes 2, 3
    static constexpr int at(int l) { return l / 4 * 4 + 2 * kRow + l % 2 + l % 4 / 2 * W; }
  };
  static LAMBDA_RETURN_INLINE void transpose(V (&x)[4]) {
    const V ab0 = shuffle<InterleaveIndex<0>>(x[0], x[1]), ab1 = shuffle<InterleaveIndex<1>>(x[0], x[1]);
    const V cd0 = shuffle<InterleaveIndex<0>>(x[2], x[3]), cd1 = shuffle<InterleaveIndex<1>>(x[2], x[3]);
    x[0] = shuffle<PairIndex<0>>(ab0, cd0);
    x[1] = shuffle<PairIndex<1>>(ab0, cd0);
    x[2] = shuffle<PairIndex<0>>(ab1, cd1);
    x[3] = shuffle<PairIndex<1>>(ab1, cd1);
  }

  // Chunk k receives what chunk k + kDistance (k - kDistance from left to right) holds, and fill where there is none.
  template <int kDistance>
  struct ReceiveIndex {
    static constexpr int at(int lane) {
      const int from = chunk_of(lane) + (kReverse ? kDistance : -kDistance);
      return from < 0 || from >= W ? W + lane : lane_of(from);
    }
  };
  template <int kDistance>
  static LAMBDA_RETURN_INLINE V receive(V x, V fill) {
    return shuffle<ReceiveIndex<kDistance>>(x, fill);
  }

  struct Constants {
    V value;                  // weight of a token's own value
    M no_value;               // all ones if that weight is 0
    V carry, carry2, carry3;  // gamma lam = c, c^2, c^3
    V power[4];               // c^4, c^8, c^16, c^32: what a token 1, 2, 4, 8 chunks away has been weighted with
    V carry_in;               // c^(tokens of the tile that the carry passes before it reaches this lane's chunk)
    V tile;                   // c^(4 W)
    LAMBDA_RETURN_INLINE explicit Constants(const ScanConstants<acc_t>& from)
        : value(broadcast<V>(kReverse ? from.value : acc_t(1))),
          no_value(M{} - (kReverse && from.value == 0 ? 1 : 0)),
          carry(broadcast<V>(from.carry)),
          carry2(broadcast<V>(from.carry * from.carry)),
          carry3(broadcast<V>(from.carry * from.carry * from.carry)),
          carry_in(load_vector<V>(kReverse ? from.carry_in_reverse : from.carry_in_forward)),
          tile(broadcast<V>(from.tile)) {
      for (int i = 0; i < 4; ++i) {
        power[i] = broadcast<V>(from.power[i]);
      }
    }
  };

  const Constants k;
  // The carry that the next tile starts from and the map a H + b of all tiles so far, as lanes (carry, b, a, 0 ...):
  // a tile's map takes carry to a' carry + b', b to a' b + b' and a to a' a, which is one multiply-add.
  V state;

  LAMBDA_RETURN_INLINE RowScan(const ScanConstants<acc_t>& constants, acc_t carry) : k(constants), state{carry, 0, 1} {}

  // a x + b. Where gamma lam is exactly 0 a coefficient 0 drops x, even an Inf.
  static LAMBDA_RETURN_INLINE V apply(V a, V b, V x) {
    if constexpr (terms == Terms::kNoCarry) {
      return b + drop(x, a == 0);
    } else {
      return multiply_add(a, x, b);
    }
  }

  // b - a x, likewise.
  static LAMBDA_RETURN_INLINE V subtract(V b, V a, V x) {
    if constexpr (terms == Terms::kNoCarry) {
      return b - drop(x, a == 0);
    } else {
      return subtract_product(b, a, x);
    }
  }

  // x through one token's map, and a weight times that token's: unchanged where the token is not valid.
  template <bool kAll>
  LAMBDA_RETURN_INLINE V step(Mask valid, V b, V x) const {
    if constexpr (kAll) {
      return apply(k.carry, b, x);
#if LAMBDA_RETURN_AVX512
    } else if constexpr (terms == Terms::kNoCarry) {
      return valid.choose(b, x);
    } else if constexpr (sizeof(acc_t) == 4) {
      return (V)_mm512_mask_fmadd_ps((__m512)x, valid.valid, (__m512)k.carry, (__m512)b);
    } else {
      return (V)_mm512_mask_fmadd_pd((__m512d)x, valid.valid, (__m512d)k.carry, (__m512d)b);
#else
    } else {
      return apply(valid.choose(k.carry, broadcast<V>(acc_t(1))), valid.keep(b), x);
#endif
    }
  }
  LAMBDA_RETURN_INLINE V weigh(Mask valid, V a) const {
#if LAMBDA_RETURN_AVX512
    if constexpr (sizeof(acc_t) == 4) {
      return (V)_mm512_mask_mul_ps((__m512)a, valid.valid, (__m512)a, (__m512)k.carry);
    } else {
      return (V)_mm512_mask_mul_pd((__m512d)a, valid.valid, (__m512d)a, (__m512d)k.carry);
    }
#else
    return a * valid.choose(k.carry, broadcast<V>(acc_t(1)));
#endif
  }

  // Which tokens are valid, from the tile's mask bytes.
  static LAMBDA_RETURN_INLINE void load_mask(Bytes bytes, Mask (&valid)[4]) {
    // Four neighbouring mask bytes are one chunk, which is one 32-bit lane.
    const auto chunks = shuffle<ChunkIndex>((Vector<int32_t, W>)bytes, (Vector<int32_t, W>)bytes);
#if LAMBDA_RETURN_AVX512
    // Hidden from GCC, which would make these constants anew for every tile on the port that shuffles need.
    static constexpr int32_t byte_of_lane[4] = {0xff, 0xff00, 0xff0000, static_cast<int32_t>(0xff000000)};
    const int32_t* byte = byte_of_lane;
    asm("" : "+r"(byte));
    for (int i = 0; i < 4; ++i) {
      if constexpr (W == 16) {
        valid[i] = {_mm512_test_epi32_mask((__m512i)chunks, _mm512_set1_epi32(byte[i]))};
      } else {
        valid[i] = {_mm256_test_epi32_mask((__m256i)chunks, _mm256_set1_epi32(byte[i]))};
      }
    }
#else
    for (int i = 0; i < 4; ++i) {
      valid[i] = Mask::of(chunks, i);
    }
#endif
  }
  struct ChunkIndex {
    static constexpr int at(int lane) { return chunk_of(lane); }
  };

  // Token i of every chunk, from and to memory order.
  template <class scalar_t>
  static LAMBDA_RETURN_INLINE void load_tile(const scalar_t* from, V (&x)[4]) {
    for (int i = 0; i < 4; ++i) {
      x[i] = load<W>(from + i * W);
    }
    transpose(x);
  }
  template <class scalar_t>
  static LAMBDA_RETURN_INLINE void store_tile(scalar_t* to, V (&x)[4]) {
    transpose(x);
    for (int i = 0; i < 4; ++i) {
      store<W>(to + i * W, x[i]);
    }
  }
  // A chunk of bfloat16 is two 32-bit lanes, the pairs (0, 1) and (2, 3): two shuffles in place of a transposition.
  template <int kPair>
  struct PairOfChunk {
    static constexpr int at(int lane) { return 2 * chunk_of(lane) + kPair; }
  };
  template <int kFirst>
  struct PairInMemory {
    static constexpr int at(int lane) { return lane_of((kFirst + lane) / 2) + lane % 2 * W; }
  };
  static LAMBDA_RETURN_INLINE void load_tile(const bfloat16_bits* from, V (&x)[4]) {
    using U = Vector<uint32_t, W>;
    const U first = load_vector<U>(from), second = load_vector<U>(from + 2 * W);
    const U pairs[2] = {shuffle<PairOfChunk<0>>(first, second), shuffle<PairOfChunk<1>>(first, second)};
    for (int i = 0; i < 4; ++i) {
      x[i] = (V)(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
    }
  }
  static LAMBDA_RETURN_INLINE void store_tile(bfloat16_bits* to, V (&x)[4]) {
    using U = Vector<uint32_t, W>;
    U pairs[2];
    for (int i = 0; i < 2; ++i) {
      pairs[i] = round_to_bfloat16<W>(x[2 * i]) >> 16 | (round_to_bfloat16<W>(x[2 * i + 1]) & 0xffff0000u);
    }
    store_vector(to, shuffle<PairInMemory<0>>(pairs[0], pairs[1]));
    store_vector(to + 2 * W, shuffle<PairInMemory<W>>(pairs[0], pairs[1]));
  }

  // values: token i of each chunk. On return out[i] is the carry h that reaches token i, or with kErrors value - h.
  // kAll: no token is masked, valid[] is not read.
  //
  // What waits for h, at the end of a long chain of operations, keeps the processor from starting on the next tiles.
  // So a value loses beforehand what it can.
  template <bool kAll, bool kErrors>
  LAMBDA_RETURN_INLINE void tile(const V (&values)[4], const Mask (&valid)[4], V (&out)[4]) {
    // What each token adds; then the maps of the first one, two, three and all four tokens in the order of the scan.
    V b[4];
    for (int i = 0; i < 4; ++i) {
      b[i] = terms == Terms::kCarryOnly && kReverse ? V{} : k.value * values[i];
      if constexpr (terms == Terms::kNoCarry) b[i] = drop(b[i], k.no_value);
    }
    constexpr int first = in_order(0), second = in_order(1), third = in_order(2), fourth = in_order(3);
    const V b0 = kAll ? b[first] : valid[first].keep(b[first]);
    const V b01 = step<kAll>(valid[second], b[second], b0);
    const V b012 = step<kAll>(valid[third], b[third], b01);
    V B = step<kAll>(valid[fourth], b[fourth], b012);
    const V a0 = kAll ? k.carry : valid[first].choose(k.carry, broadcast<V>(acc_t(1)));
    const V a01 = kAll ? k.carry2 : weigh(valid[second], a0);
    const V a012 = kAll ? k.carry3 : weigh(valid[third], a01);
    V A = kAll ? k.power[0] : weigh(valid[fourth], a012);
    // Inclusive scan over the chunks; then what reaches a chunk is the composite of its neighbour.
    if constexpr (kAll) {
      B = apply(k.power[0], B, receive<1>(B, V{}));
      B = apply(k.power[1], B, receive<2>(B, V{}));
      if constexpr (W > 4) B = apply(k.power[2], B, receive<4>(B, V{}));
      if constexpr (W > 8) B = apply(k.power[3], B, receive<8>(B, V{}));
    } else {
      compose_neighbour<1>(A, B);
      compose_neighbour<2>(A, B);
      if constexpr (W > 4) compose_neighbour<4>(A, B);
      if constexpr (W > 8) compose_neighbour<8>(A, B);
    }
    const V carry_in = kAll ? k.carry_in : receive<1>(A, broadcast<V>(acc_t(1)));
    const V h = apply(carry_in, receive<1>(B, V{}), broadcast_lane<0>(state));
    constexpr int last = kReverse ? lane_of(0) : lane_of(W - 1);
    state = apply(kAll ? k.tile : broadcast_lane<last>(A), shuffle<StateIndex<last>>(B, V{}), state);

    if constexpr (kErrors) {
      out[first] = values[first] - h;
      out[second] = subtract(values[second] - b0, a0, h);
      out[third] = subtract(values[third] - b01, a01, h);
      out[fourth] = subtract(values[fourth] - b012, a012, h);
    } else {
      out[first] = h;
      out[second] = step<kAll>(valid[first], b[first], h);
      out[third] = apply(a01, b01, h);
      out[fourth] = apply(a012, b012, h);
    }
  }
  // One lane of the first in lanes 0 and 1, the second in the others.
  template <int kLane>
  struct StateIndex {
    static constexpr int at(int lane) { return lane < 2 ? kLane : W + lane; }
  };
  static constexpr int in_order(int j) { return kReverse ? 3 - j : j; }

  template <int kDistance>
  static LAMBDA_RETURN_INLINE void compose_neighbour(V& A, V& B) {
    B = apply(A, B, receive<kDistance>(B, V{}));
    A = A * receive<kDistance>(A, broadcast<V>(acc_t(1)));
  }

  LAMBDA_RETURN_INLINE AffineMap<acc_t> map() const { return {state[2], state[1]}; }
};

// How many tokens of a tile are valid: none, all, or some.
enum class Fill { kNone, kSome, kAll };

template <int kTile>
LAMBDA_RETURN_INLINE Fill mask_fill(const uint8_t* bytes) {
#if LAMBDA_RETURN_AVX512
  uint64_t valid, all;
  if constexpr (kTile == 64) {
    const auto x = load_vector<__m512i>(bytes);
    valid = _mm512_test_epi8_mask(x, x), all = ~uint64_t(0);
  } else {
    static_assert(kTile == 32);
    const auto x = load_vector<__m256i>(bytes);
    valid = _mm256_test_epi8_mask(x, x), all = 0xffffffffu;
  }
  return valid == 0 ? Fill::kNone : valid == all ? Fill::kAll : Fill::kSome;
#elif LAMBDA_RETURN_FMA
  if constexpr (kTile >= 32) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i any = zero, all = _mm256_set1_epi8(-1);
    for (int i = 0; i < kTile; i += 32) {
      const auto x = load_vector<__m256i>(bytes + i);
      any = _mm256_or_si256(any, x);
      all = _mm256_min_epu8(all, x);
    }
    return _mm256_testz_si256(any, any)                              ? Fill::kNone
           : _mm256_movemask_epi8(_mm256_cmpeq_epi8(all, zero)) == 0 ? Fill::kAll
                                                                     : Fill::kSome;
  } else {
    const auto x = load_vector<__m128i>(bytes);
    return _mm_testz_si128(x, x)                                            ? Fill::kNone
           : _mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())) == 0 ? Fill::kAll
                                                                            : Fill::kSome;
  }
#else
  using Bytes = Vector<uint8_t, kTile>;
  const auto x = load_vector<Bytes>(bytes);
  uint64_t words[kTile / 8], invalid[kTile / 8];
  store_vector(words, x);
  store_vector(invalid, x == 0);
  uint64_t any = 0, missing = 0;
  for (int i = 0; i < kTile / 8; ++i) {
    any |= words[i];
    missing |= invalid[i];
  }
  return any == 0 ? Fill::kNone : missing == 0 ? Fill::kAll : Fill::kSome;
#endif
}

// Nonzero where both bytes are: masks hold any byte.
template <class Bytes>
LAMBDA_RETURN_INLINE Bytes smaller(Bytes a, Bytes b) {
  return a < b ? a : b;
}

// How many bytes are not zero.
template <class Bytes>
LAMBDA_RETURN_INLINE int64_t count_valid(Bytes x) {
  constexpr int kTile = sizeof(Bytes);
#if LAMBDA_RETURN_AVX512
  if constexpr (kTile == 64) {
    return __builtin_popcountll(_mm512_test_epi8_mask((__m512i)x, (__m512i)x));
  } else {
    return __builtin_popcountll(_mm256_test_epi8_mask((__m256i)x, (__m256i)x));
  }
#elif LAMBDA_RETURN_FMA
  if constexpr (kTile == 64) {
    return count_valid(low_half(x)) + count_valid(high_half(x));
  } else if constexpr (kTile == 32) {
    return 32 - __builtin_popcount(_mm256_movemask_epi8((__m256i)(x == 0)));
  } else {
    return 16 - __builtin_popcount(_mm_movemask_epi8((__m128i)(x == 0)));
  }
#else
  uint64_t words[kTile / 8], sum = 0;
  store_vector(words, (Bytes)(x != 0) & 1);
  for (const uint64_t word : words) {
    sum += word;
  }
  return sum * 0x0101010101010101u >> 56;  // all bytes of sum, which do not overflow
#endif
}
