// Vectors of W lanes in the compiler's own vector types (GCC and clang): one source for every instruction set.
//
// No include guard: included once for each instruction set, under its target, inside a namespace of its own; see
// instruction_set.h. Everything is inlined, so no vector crosses a function call.

template <class T, int W>
struct VectorType {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vector = typename VectorType<T, W>::type;

// The integer of T's size. A comparison gives lanes of it: all ones where true, 0 where false.
template <class T>
using lane_mask_t = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class V>
LAMBDA_RETURN_INLINE V load_vector(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

template <class V>
LAMBDA_RETURN_INLINE void store_vector(void* to, V x) {
  std::memcpy(to, &x, sizeof(V));
}

template <class V, class T>
LAMBDA_RETURN_INLINE V broadcast(T x) {
  return x - V{};  // x itself; x + V{} would have to be computed, as it is 0 where x is -0
}

// +0 where dropped is all ones, whatever stands there in x; x where it is 0.
template <class V, class M>
LAMBDA_RETURN_INLINE V drop(V x, M dropped) {
  return (V)((M)x & ~dropped);
}

// The lower and upper half of x.
template <int kFirst, class V, int... L>
LAMBDA_RETURN_INLINE auto half_from(V x, std::integer_sequence<int, L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (kFirst + L)...);
#else
  return Vector<std::decay_t<decltype(x[0])>, sizeof...(L)>{x[kFirst + L]...};
#endif
}
template <class V>
LAMBDA_RETURN_INLINE auto low_half(V x) {
  return half_from<0>(x, std::make_integer_sequence<int, sizeof(V) / sizeof(x[0]) / 2>());
}
template <class V>
LAMBDA_RETURN_INLINE auto high_half(V x) {
  constexpr int half = sizeof(V) / sizeof(x[0]) / 2;
  return half_from<half>(x, std::make_integer_sequence<int, half>());
}
template <class V, class Half>
LAMBDA_RETURN_INLINE V join(Half low, Half high) {
  V x;
  std::memcpy(&x, &low, sizeof(Half));
  std::memcpy(reinterpret_cast<char*>(&x) + sizeof(Half), &high, sizeof(Half));
  return x;
}

// a * b + c. Rounded once where the instruction set can, and the same wherever it is called.
template <class V>
LAMBDA_RETURN_INLINE V multiply_add(V a, V b, V c) {
#if LAMBDA_RETURN_FMA
  constexpr bool is_float = sizeof(a[0]) == 4;
#if LAMBDA_RETURN_AVX512
  if constexpr (sizeof(V) == 64 && is_float) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else if constexpr (sizeof(V) == 64) {
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  } else
#endif
      if constexpr (sizeof(V) > 32) {  // wider than a register
    return join<V>(
        multiply_add(low_half(a), low_half(b), low_half(c)), multiply_add(high_half(a), high_half(b), high_half(c)));
  } else if constexpr (is_float) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return a * b + c;
#endif
}

// c - a * b, likewise. (A multiply_add of -b in its place takes 3 to 7 % of a loss.)
template <class V>
LAMBDA_RETURN_INLINE V subtract_product(V c, V a, V b) {
#if LAMBDA_RETURN_FMA
  constexpr bool is_float = sizeof(a[0]) == 4;
#if LAMBDA_RETURN_AVX512
  if constexpr (sizeof(V) == 64 && is_float) {
    return (V)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else if constexpr (sizeof(V) == 64) {
    return (V)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  } else
#endif
      if constexpr (sizeof(V) > 32) {
    return join<V>(
        subtract_product(low_half(c), low_half(a), low_half(b)),
        subtract_product(high_half(c), high_half(a), high_half(b)));
  } else if constexpr (is_float) {
    return (V)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (V)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return c - a * b;
#endif
}

// Lane l of the result is lane Index::at(l) of a followed by b.
template <class Index, class V, int... L>
LAMBDA_RETURN_INLINE V shuffle(V a, V b, std::integer_sequence<int, L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index::at(L)...);
#else
  return __builtin_shuffle(a, b, Vector<lane_mask_t<std::decay_t<decltype(a[0])>>, sizeof...(L)>{Index::at(L)...});
#endif
}
template <class Index, class V>
LAMBDA_RETURN_INLINE V shuffle(V a, V b) {
  return shuffle<Index>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}

template <int kLane>
struct LaneIndex {
  static constexpr int at(int) { return kLane; }
};
// One lane of x in all lanes.
template <int kLane, class V>
LAMBDA_RETURN_INLINE V broadcast_lane(V x) {
  return shuffle<LaneIndex<kLane>>(x, x);
}

// ---- masks: which of W tokens are valid
// ------------------------------------------------------------------------------

// One mask byte a lane. GCC takes bytes apart one by one where it is left to widen them.
template <int W>
LAMBDA_RETURN_INLINE Vector<int32_t, W> widen_bytes(const uint8_t* from) {
  using Lanes = Vector<int32_t, W>;
#if LAMBDA_RETURN_FMA
#if LAMBDA_RETURN_AVX512
  if constexpr (W == 16) {
    return (Lanes)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  } else
#endif
      if constexpr (W == 4) {
    return (Lanes)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load_vector<int32_t>(from)));
  } else if constexpr (W == 8) {
    return (Lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  } else {
    return join<Lanes>(widen_bytes<W / 2>(from), widen_bytes<W / 2>(from + W / 2));
  }
#else
  return __builtin_convertvector(load_vector<Vector<uint8_t, W>>(from), Lanes);
#endif
}

// Here as lanes, all ones where a token is not valid.
template <class T, int W>
struct TokenMask {
  using V = Vector<T, W>;
  using M = Vector<lane_mask_t<T>, W>;
  M dropped;

  // From byte i of each lane.
  static LAMBDA_RETURN_INLINE TokenMask of(Vector<int32_t, W> lanes, int i) {
    return {(__builtin_convertvector(lanes, M) & static_cast<int32_t>(0xffu << 8 * i)) == 0};
  }
  LAMBDA_RETURN_INLINE TokenMask operator&(TokenMask other) const { return {dropped | other.dropped}; }
  // x of valid tokens, +0 of the others.
  LAMBDA_RETURN_INLINE V keep(V x) const { return drop(x, dropped); }
  LAMBDA_RETURN_INLINE V choose(V valid, V masked) const { return dropped ? masked : valid; }

  struct Counter {
    M minus_dropped{};

    LAMBDA_RETURN_INLINE void add(TokenMask mask) { minus_dropped += mask.dropped; }
    LAMBDA_RETURN_INLINE int64_t dropped() const {
      int64_t sum = 0;
      for (int lane = 0; lane < W; ++lane) {
        sum -= minus_dropped[lane];
      }
      return sum;
    }
  };
};

#if LAMBDA_RETURN_AVX512
// In mask registers, a bit a lane, 1 where a token is valid: most instructions take them at no cost.
template <class Bits>
struct BitCounter {
  int64_t count = 0;

  template <class Mask>
  LAMBDA_RETURN_INLINE void add(Mask mask) {
    count += __builtin_popcount(static_cast<Bits>(~mask.valid));
  }
  LAMBDA_RETURN_INLINE int64_t dropped() const { return count; }
};

template <>
struct TokenMask<float, 16> {
  using V = Vector<float, 16>;
  using Counter = BitCounter<uint16_t>;
  __mmask16 valid;

  static LAMBDA_RETURN_INLINE TokenMask of(Vector<int32_t, 16> lanes, int i) {
    return {_mm512_test_epi32_mask((__m512i)lanes, _mm512_set1_epi32(static_cast<int32_t>(0xffu << 8 * i)))};
  }
  LAMBDA_RETURN_INLINE TokenMask operator&(TokenMask other) const {
    return {static_cast<__mmask16>(valid & other.valid)};
  }
  LAMBDA_RETURN_INLINE V keep(V x) const { return (V)_mm512_maskz_mov_ps(valid, (__m512)x); }
  LAMBDA_RETURN_INLINE V choose(V of_valid, V of_masked) const {
    return (V)_mm512_mask_mov_ps((__m512)of_masked, valid, (__m512)of_valid);
  }
};

template <>
struct TokenMask<double, 8> {
  using V = Vector<double, 8>;
  using Counter = BitCounter<uint8_t>;
  __mmask8 valid;

  static LAMBDA_RETURN_INLINE TokenMask of(Vector<int32_t, 8> lanes, int i) {
    return {_mm256_test_epi32_mask((__m256i)lanes, _mm256_set1_epi32(static_cast<int32_t>(0xffu << 8 * i)))};
  }
  LAMBDA_RETURN_INLINE TokenMask operator&(TokenMask other) const {
    return {static_cast<__mmask8>(valid & other.valid)};
  }
  LAMBDA_RETURN_INLINE V keep(V x) const { return (V)_mm512_maskz_mov_pd(valid, (__m512d)x); }
  LAMBDA_RETURN_INLINE V choose(V of_valid, V of_masked) const {
    return (V)_mm512_mask_mov_pd((__m512d)of_masked, valid, (__m512d)of_valid);
  }
};
#endif

// ---- memory: W values of a dtype as lanes of its accumulation dtype, and back, rounded to nearest even --------------

template <int W>
LAMBDA_RETURN_INLINE Vector<float, W> load(const float* from) {
  return load_vector<Vector<float, W>>(from);
}
template <int W>
LAMBDA_RETURN_INLINE void store(float* to, Vector<float, W> x) {
  store_vector(to, x);
}

template <int W>
LAMBDA_RETURN_INLINE Vector<double, W> load(const double* from) {
  return load_vector<Vector<double, W>>(from);
}
template <int W>
LAMBDA_RETURN_INLINE void store(double* to, Vector<double, W> x) {
  store_vector(to, x);
}

// bfloat16 is the upper half of a float32.
template <int W>
LAMBDA_RETURN_INLINE Vector<float, W> load(const bfloat16_bits* from) {
  const auto bits = load_vector<Vector<uint16_t, W>>(from);
  return (Vector<float, W>)(__builtin_convertvector(bits, Vector<uint32_t, W>) << 16);
}
// Rounded in the upper half of each lane; what is left in the lower half means nothing.
template <int W>
LAMBDA_RETURN_INLINE Vector<uint32_t, W> round_to_bfloat16(Vector<float, W> x) {
  using U = Vector<uint32_t, W>;
  const U bits = (U)x;
  return (x == x) ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;  // rounding could carry a NaN into Inf
}
template <int W>
LAMBDA_RETURN_INLINE void store(bfloat16_bits* to, Vector<float, W> x) {
  const auto result = round_to_bfloat16<W>(x) >> 16;
#if LAMBDA_RETURN_AVX512
  if constexpr (W == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)result));
  } else
#endif
  {
    store_vector(to, __builtin_convertvector(result, Vector<uint16_t, W>));
  }
}

template <int W>
LAMBDA_RETURN_INLINE Vector<float, W> load(const float16_bits* from) {
#if LAMBDA_RETURN_FMA
#if LAMBDA_RETURN_AVX512
  if constexpr (W == 16) {
    return (Vector<float, W>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  } else
#endif
      if constexpr (W == 8) {
    return (Vector<float, W>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  } else {
    return join<Vector<float, W>>(load<W / 2>(from), load<W / 2>(from + W / 2));
  }
#else
  using U = Vector<uint32_t, W>;
  const U bits = __builtin_convertvector(load_vector<Vector<uint16_t, W>>(from), U);
  const U magnitude = (bits & 0x7fff) << 13;
  // The exponents of the two formats differ by 112; the multiplication also makes float16's subnormals normal.
  const U finite = (U)((Vector<float, W>)magnitude * 0x1p112f);
  const U result = (magnitude >= (0x7c00u << 13)) ? magnitude | 0x7f800000u : finite;  // Inf and NaN
  return (Vector<float, W>)(result | (bits & 0x8000) << 16);
#endif
}
template <int W>
LAMBDA_RETURN_INLINE void store(float16_bits* to, Vector<float, W> x) {
#if LAMBDA_RETURN_FMA
#if LAMBDA_RETURN_AVX512
  if constexpr (W == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  } else
#endif
      if constexpr (W == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  } else {
    store<W / 2>(to, low_half(x));
    store<W / 2>(to + W / 2, high_half(x));
  }
#else
  using U = Vector<uint32_t, W>;
  const U sign = ((U)x >> 16) & 0x8000, magnitude = (U)x & 0x7fffffffu;
  // Adding 0.5 leaves float16's subnormals, rounded, in the last bits; above them the excess of the exponent goes and
  // the 13 bits too many are rounded away.
  const U subnormal = (U)((Vector<float, W>)magnitude + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U finite = (magnitude < 0x38800000u) ? subnormal : normal;
  const U special = (magnitude > 0x7f800000u) ? U{} + 0x7e00u : U{} + 0x7c00u;  // NaN, Inf and what rounds to Inf
  const U result = (magnitude >= 0x477ff000u) ? special : finite;
  store_vector(to, __builtin_convertvector(result | sign, Vector<uint16_t, W>));
#endif
}
