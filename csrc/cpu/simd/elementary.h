// The exponential, the logarithm and what is made of them, in vectors of float32 or float64.
//
// No include guard: see row_kernels.h.

// c[0] x^(N - 1) + ... + c[N - 1]
template <class V, class T, int N>
LAMBDA_RETURN_INLINE V polynomial(const T (&c)[N], V x) {
  V y = broadcast<V>(c[0]);
  for (int i = 1; i < N; ++i) {
    y = multiply_add(y, x, broadcast<V>(c[i]));
  }
  return y;
}

// least: what is below counts as -inf, so that no result is subnormal. round: what is added to it comes out rounded to
// an integer, in its last bits. ln_2 in two parts, of which integers times the first are exact. series: of
// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2; minimax from Cephes' expf, and Taylor's 1 / 13! ... 1 / 2!.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float least = -87, round = 0x1.8p23f, log2_e = 1.44269504f;
  static constexpr float ln_2 = 0.693359375f, ln_2_rest = -2.12194440e-4f;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float series[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct Exponential<double> {
  static constexpr double least = -708, round = 0x1.8p52, log2_e = 0x1.71547652b82fep0;
  static constexpr double ln_2 = 0x1.62e42feep-1, ln_2_rest = 0x1.a39ef35793c76p-33;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double series[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                      1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                      1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
};

// exp(x) for x <= 0, to one epsilon. A NaN stays one.
template <class T, class V>
LAMBDA_RETURN_INLINE V exp_of(V x) {
  using E = Exponential<T>;
  using M = decltype(x < x);
  const V least = broadcast<V>(E::least), round = broadcast<V>(E::round);
  const V held = x < least ? least : x;
  const V shifted = multiply_add(held, broadcast<V>(E::log2_e), round), n = shifted - round;
  const V r = multiply_add(n, broadcast<V>(-E::ln_2_rest), multiply_add(n, broadcast<V>(-E::ln_2), held));
  const V y = multiply_add(polynomial(E::series, r), r * r, r) + 1;
  const V power = (V)(((M)shifted - (M)round + E::bias) << E::mantissa_bits);
  return x < least ? V{} : y * power;
}

// 1 / (1 + exp(-x)), to two epsilon; 0 instead of less than the least normal number.
template <class T, class V>
LAMBDA_RETURN_INLINE V sigmoid_of(V x) {
  const V z = exp_of<T>(x < 0 ? x : -x);  // no overflow on either side
  return (x < 0 ? z : broadcast<V>(T(1))) / (1 + z);
}

// (atanh(s) - s) / s^3 as a polynomial in s^2 for |s| <= 1 / 3, interpolated at the zeros of a Chebyshev polynomial, to
// less than a thirtieth of a rounding of atanh.
template <class T>
struct Logarithm;
template <>
struct Logarithm<float> {
  static constexpr float series[] = {
      1.161216461e-01f, 1.085328790e-01f, 1.429617900e-01f, 1.999985317e-01f, 3.333333366e-01f};
};
template <>
struct Logarithm<double> {
  static constexpr double series[] = {8.08202280597176611e-02, 4.40036924307233694e-02, 6.00053640479535627e-02,
                                      6.65707210482746808e-02, 7.69278503247931155e-02, 9.09089471806642908e-02,
                                      1.11111113587139315e-01, 1.42857142835543786e-01, 2.00000000000072913e-01,
                                      3.33333333333333293e-01};
};

// log((b + a) / (b - a)) = 2 atanh(a / b) for |a / b| <= 1 / 3, relatively as exact as a and b.
template <class T, class V>
LAMBDA_RETURN_INLINE V log_ratio(V a, V b) {
  const V s = a / b, square = s * s, twice = s + s;
  return multiply_add(twice * square, polynomial(Logarithm<T>::series, square), twice);
}

// log(1 + z) for 0 <= z <= 1.
template <class T, class V>
LAMBDA_RETURN_INLINE V log1p_of(V z) {
  return log_ratio<T>(z, 2 + z);
}

// log(x) for 0 <= x <= 1, of which float64 holds the subnormal as little as 0: of these, something below -100. NaN
// below 0.
template <class T, class V>
LAMBDA_RETURN_INLINE V log_of(V x) {
  using E = Exponential<T>;
  using M = decltype(x < x);
  using Bits = Vector<std::make_unsigned_t<lane_mask_t<T>>, sizeof(V) / sizeof(T)>;
  constexpr int lift = 32;  // what float32 has below the normal numbers becomes normal, and 0 a power of two far below
  const V round = broadcast<V>(E::round);
  // x = m 2^n with m from sqrt(1 / 2) to sqrt(2).
  const Bits bits = (Bits)(x > 0 ? x * T(0x1p32) : V{});
  const Bits one = (Bits)broadcast<V>(T(1)), least = (Bits)broadcast<V>(T(0x1.6a09e667f3bcdp-1));
  const M exponent = (M)((bits + (one - least)) >> E::mantissa_bits) - E::bias;
  const V m = (V)((M)bits - (exponent << E::mantissa_bits)), n = (V)((M)round + (exponent - lift)) - round;
  const V log_m = log_ratio<T>(m - 1, m + 1);
  const V y = multiply_add(n, broadcast<V>(E::ln_2), multiply_add(n, broadcast<V>(E::ln_2_rest), log_m));
  return x >= 0 ? y : broadcast<V>(static_cast<T>(NAN));
}

// log(1 - x) for 0 <= x <= 1, of 1 something below -100. NaN above 1.
template <class T, class V>
LAMBDA_RETURN_INLINE V log_rest_of(V x) {
  return x < T(0.5) ? log_ratio<T>(-x, 2 - x) : log_of<T>(1 - x);  // from 1 / 2 on 1 - x is exact
}
