// Complex DFTs in shared memory, in place, by one block: Stockham passes as in common/fft_plan.h, Bluestein else.
// `columns` transforms of one length lie interleaved (element i of column c at i·columns + c), which is the state of
// one longer transform with initial stride `columns`; `lines` such bundles may follow each other. Accumulation in
// float32. In a pass a thread reads butterflies_per_thread<kElements>(radix) butterflies into registers, the block
// meets, and the results are written over the inputs: so no second buffer, and a Bluestein transform of length 16384
// fits (136 KB). Limit: points ≤ threads · radix · butterflies_per_thread for every radix of the plan; the launchers
// see to it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastmix {

// A plan on the device: n the length asked for, m the length transformed (m > n: Bluestein).
struct FftView {
  int n;
  int m;
  uint64_t radices;        // four bits a pass, radix − 1, the first pass lowest
  const float2* twiddles;  // of all passes, one after the other
  const float2* chirp;     // n, null when m = n
  const float2* spectrum;  // m
};

// 16 complex values a thread leave room for two blocks of 512 threads on a multiprocessor (64 registers); 32 are for
// transforms that need the whole shared memory.
template <int kElements>
__host__ __device__ constexpr int butterflies_per_thread(int radix) {
  if (kElements == 16) return radix > 8 ? 1 : 16 / radix;
  return (kElements + radix - 1) / radix;
}

// One float2 in 17 is unused: strides that are powers of two then spread over the banks.
__host__ __device__ constexpr int padded(int index) { return index + (index >> 4); }

__device__ inline float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ inline float2 cmul(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
__device__ inline float2 conj(float2 a) { return make_float2(a.x, -a.y); }
__device__ inline float2 swap(float2 a) { return make_float2(a.y, a.x); }

// Quotients of small non-negative numbers (numerator · divisor < 2^32) by one multiplication.
struct SmallDivisor {
  unsigned divisor, reciprocal;
  __device__ explicit SmallDivisor(int d) : divisor(d), reciprocal(0xFFFFFFFFu / d + 1) {}
  __device__ int divide(int numerator) const { return divisor == 1 ? numerator : __umulhi(numerator, reciprocal); }
};

// In place, natural order.
__device__ inline void dft4(float2& a, float2& b, float2& c, float2& d) {
  const float2 ac = a + c, bd = b + d, a_c = a - c, b_d = b - d;
  a = ac + bd;
  b = make_float2(a_c.x + b_d.y, a_c.y - b_d.x);
  c = ac - bd;
  d = make_float2(a_c.x - b_d.y, a_c.y + b_d.x);
}

// cos and sin of 2πj/R, j ≤ R/2.
template <int R>
__device__ constexpr float root_cos(int j) {
  constexpr float k3[] = {1.f, -0.5f};
  constexpr float k5[] = {1.f, 0.30901699437494745f, -0.80901699437494745f};
  constexpr float k7[] = {1.f, 0.62348980185873353f, -0.22252093395631440f, -0.90096886790241913f};
  constexpr float k11[] = {1.f,
                           0.84125353283118117f,
                           0.41541501300188643f,
                           -0.14231483827328514f,
                           -0.65486073394528507f,
                           -0.95949297361449739f};
  constexpr float k13[] = {1.f,
                           0.88545602565320989f,
                           0.56806474673115581f,
                           0.12053668025532305f,
                           -0.35460488704253562f,
                           -0.74851074817110109f,
                           -0.97094181742605203f};
  return R == 3 ? k3[j % 2] : R == 5 ? k5[j % 3] : R == 7 ? k7[j % 4] : R == 11 ? k11[j % 6] : k13[j % 7];
}

template <int R>
__device__ constexpr float root_sin(int j) {
  constexpr float k3[] = {0.f, 0.86602540378443865f};
  constexpr float k5[] = {0.f, 0.95105651629515357f, 0.58778525229247313f};
  constexpr float k7[] = {0.f, 0.78183148246802981f, 0.97492791218182361f, 0.43388373911755812f};
  constexpr float k11[] = {0.f,
                           0.54064081745559758f,
                           0.90963199535451837f,
                           0.98982144188093273f,
                           0.75574957435425829f,
                           0.28173255684142969f};
  constexpr float k13[] = {0.f,
                           0.46472317204376854f,
                           0.82298386589365639f,
                           0.99270887409805399f,
                           0.93501624268541483f,
                           0.66312265824079520f,
                           0.23931566428755776f};
  return R == 3 ? k3[j % 2] : R == 5 ? k5[j % 3] : R == 7 ? k7[j % 4] : R == 11 ? k11[j % 6] : k13[j % 7];
}

// emit(k, Σ_j v[j] exp(−2πi·jk/R)) for every k; v is used up.
template <int R, class Emit>
__device__ __forceinline__ void butterfly(float2 (&v)[R], const Emit& emit) {
  constexpr float kHalf = 0.70710678118654752f;
  if constexpr (R == 2) {
    emit(0, v[0] + v[1]);
    emit(1, v[0] - v[1]);
  } else if constexpr (R == 4) {
    dft4(v[0], v[1], v[2], v[3]);
#pragma unroll
    for (int k = 0; k < 4; ++k) emit(k, v[k]);
  } else if constexpr (R == 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 sum = v[j] + v[j + 4], difference = v[j] - v[j + 4];
      v[j] = sum;
      v[j + 4] = difference;
    }
    v[5] = make_float2((v[5].x + v[5].y) * kHalf, (v[5].y - v[5].x) * kHalf);
    v[6] = make_float2(v[6].y, -v[6].x);
    v[7] = make_float2((v[7].y - v[7].x) * kHalf, -(v[7].x + v[7].y) * kHalf);
    dft4(v[0], v[1], v[2], v[3]);
    dft4(v[4], v[5], v[6], v[7]);
#pragma unroll
    for (int k = 0; k < 8; ++k) emit(k, v[k / 2 + 4 * (k % 2)]);
  } else if constexpr (R == 16) {
    constexpr float kCos = 0.92387953251128674f, kSin = 0.38268343236508977f;
#pragma unroll
    for (int j = 0; j < 4; ++j) dft4(v[j], v[j + 4], v[j + 8], v[j + 12]);
    v[5] = cmul(v[5], make_float2(kCos, -kSin));
    v[6] = make_float2((v[6].x + v[6].y) * kHalf, (v[6].y - v[6].x) * kHalf);
    v[7] = cmul(v[7], make_float2(kSin, -kCos));
    v[9] = make_float2((v[9].x + v[9].y) * kHalf, (v[9].y - v[9].x) * kHalf);
    v[10] = make_float2(v[10].y, -v[10].x);
    v[11] = make_float2((v[11].y - v[11].x) * kHalf, -(v[11].x + v[11].y) * kHalf);
    v[13] = cmul(v[13], make_float2(kSin, -kCos));
    v[14] = make_float2((v[14].y - v[14].x) * kHalf, -(v[14].x + v[14].y) * kHalf);
    v[15] = cmul(v[15], make_float2(-kCos, kSin));
#pragma unroll
    for (int k = 0; k < 4; ++k) dft4(v[4 * k], v[4 * k + 1], v[4 * k + 2], v[4 * k + 3]);
#pragma unroll
    for (int k = 0; k < 16; ++k) emit(k, v[k / 4 + 4 * (k % 4)]);
  } else {
    float2 total = v[0];
#pragma unroll
    for (int j = 1; j <= R / 2; ++j) {
      const float2 sum = v[j] + v[R - j], difference = v[j] - v[R - j];
      v[j] = sum;
      v[R - j] = difference;
      total = total + sum;
    }
    emit(0, total);
#pragma unroll
    for (int k = 1; k <= R / 2; ++k) {
      float2 even = v[0], odd = make_float2(0.f, 0.f);
#pragma unroll
      for (int j = 1; j <= R / 2; ++j) {
        const int turn = j * k % R;
        const float c = root_cos<R>(turn <= R / 2 ? turn : R - turn);
        const float s = turn <= R / 2 ? root_sin<R>(turn) : -root_sin<R>(R - turn);
        even.x += c * v[j].x;
        even.y += c * v[j].y;
        odd.x += s * v[R - j].x;
        odd.y += s * v[R - j].y;
      }
      emit(k, make_float2(even.x + odd.y, even.y - odd.x));
      emit(R - k, make_float2(even.x - odd.y, even.y + odd.x));
    }
  }
}

// The state of the passes. A bundle is one line of interleaved columns.
struct FftPasses {
  uint64_t radices;
  const float2* twiddles;
  int length;  // of the transforms that are left in a bundle
  int stride;  // their number
  int bundle;  // points of a bundle
  int points;  // of all bundles
};

// The first pass may read from elsewhere: load(i, c) is element i of column c.
template <class Load>
struct ElementSource {
  static constexpr bool kInPlace = false, kOneLine = true;
  const Load& load;
  int columns;
};

template <bool kOneLine_>
struct SharedSource {
  static constexpr bool kInPlace = true, kOneLine = kOneLine_;
};

// Threads without a butterfly: a value that is not written on every path would stay live through all other passes.
template <int kRadix>
__device__ __forceinline__ void clear(float2 (&v)[kRadix]) {
#pragma unroll
  for (int j = 0; j < kRadix; ++j) v[j] = make_float2(0.f, 0.f);
}

template <int kRadix, int kElements, class Source>
__device__ __forceinline__ void fft_pass(float2* data, const FftPasses& state, const Source& source) {
  constexpr int kCount = butterflies_per_thread<kElements>(kRadix);
  const int butterflies = state.points / kRadix;
  const int step = state.bundle / kRadix;
  const int rest = state.length / kRadix;
  // Opaque, or the compiler computes the addresses of all passes ahead of their loop and spills them.
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const SmallDivisor by_step(step);
  const auto line_of = [&](int index) { return Source::kOneLine ? 0 : by_step.divide(index); };
  float2 v[kCount][kRadix];
  if constexpr (Source::kInPlace) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int index = thread + u * blockDim.x;
      if (index < butterflies) {
        const int from = index + line_of(index) * (state.bundle - step);
#pragma unroll
        for (int j = 0; j < kRadix; ++j) v[u][j] = data[padded(from + step * j)];
      } else {
        clear(v[u]);
      }
    }
    __syncthreads();
  } else {
    const SmallDivisor by_columns(source.columns);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int index = thread + u * blockDim.x;
      if (index < butterflies) {
        const int row = by_columns.divide(index);
        const int column = index - row * source.columns;
#pragma unroll
        for (int j = 0; j < kRadix; ++j) v[u][j] = source.load(row + rest * j, column);
      } else {
        clear(v[u]);
      }
    }
  }
  const SmallDivisor by_stride(state.stride);
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int index = thread + u * blockDim.x;
    if (index < butterflies) {
      const int line = line_of(index);
      const int p = by_stride.divide(index - line * step);
      const int to = index + line * (state.bundle - step) + p * state.stride * (kRadix - 1);
      if (rest > 1) {
        const float2* twiddles = state.twiddles + p * (kRadix - 1) - 1;
        butterfly<kRadix>(v[u], [&](int k, float2 value) {
          data[padded(to + state.stride * k)] = k == 0 ? value : cmul(value, __ldg(twiddles + k));
        });
      } else {
        butterfly<kRadix>(v[u], [&](int k, float2 value) { data[padded(to + state.stride * k)] = value; });
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ int pass_radix(const FftPasses& state) { return static_cast<int>(state.radices & 15) + 1; }

__device__ __forceinline__ void advance(FftPasses& state) {
  const int radix = pass_radix(state);
  state.length /= radix;
  state.stride *= radix;
  state.twiddles += state.length * (radix - 1);
  state.radices >>= 4;
}

template <int kElements, bool kOneLine>
__device__ __forceinline__ void remaining_passes(float2* data, FftPasses& state) {
  for (; state.length > 1; advance(state)) {
    switch (pass_radix(state)) {
      case 2:
        fft_pass<2, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 3:
        fft_pass<3, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 4:
        fft_pass<4, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 5:
        fft_pass<5, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 7:
        fft_pass<7, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 8:
        fft_pass<8, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 11:
        fft_pass<11, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      case 13:
        fft_pass<13, kElements>(data, state, SharedSource<kOneLine>{});
        break;
      default:
        fft_pass<16, kElements>(data, state, SharedSource<kOneLine>{});
    }
  }
}

__device__ __forceinline__ FftPasses first_pass(const FftView& plan, int columns, int lines) {
  const int bundle = plan.m * columns;
  return FftPasses{plan.radices, plan.twiddles, plan.m, columns, bundle, bundle * lines};
}

// DFTs of length plan.m in natural order, lines · columns of them. The caller's writes to data must be behind a
// barrier, and the results are.
template <int kElements>
__device__ __forceinline__ void fft_shared(float2* data, const FftView& plan, int columns, int lines) {
  FftPasses state = first_pass(plan, columns, lines);
  remaining_passes<kElements, false>(data, state);
}

// One line of DFTs of length plan.n, of the elements load(i, c). Element k of the result is fft_result(…, k, c).
// kFuseLoad: the first pass loads by itself, with a whole butterfly's loads in flight.
template <int kElements, bool kFuseLoad, class Load>
__device__ __forceinline__ void fft_loaded(float2* data, const FftView& plan, int columns, const Load& load) {
  const bool bluestein = plan.m > plan.n;
  const SmallDivisor by_columns(columns);
  FftPasses state = first_pass(plan, columns, 1);
  const int radix = plan.n > 1 ? pass_radix(state) : 1;
  if (kFuseLoad && !bluestein && radix == 16) {
    fft_pass<16, kElements>(data, state, ElementSource<Load>{load, columns});
    advance(state);
  } else if (kFuseLoad && !bluestein && radix == 8) {
    fft_pass<8, kElements>(data, state, ElementSource<Load>{load, columns});
    advance(state);
  } else {
    for (int index = threadIdx.x; index < state.points; index += blockDim.x) {
      const int i = by_columns.divide(index);
      float2 value = make_float2(0.f, 0.f);
      if (i < plan.n) {
        value = load(i, index - i * columns);
        if (bluestein) value = cmul(value, __ldg(plan.chirp + i));
      }
      data[padded(index)] = value;
    }
    __syncthreads();
  }
  for (bool again = bluestein;; again = false) {
    remaining_passes<kElements, true>(data, state);
    if (!again) return;
    for (int index = threadIdx.x; index < state.points; index += blockDim.x) {
      const float2 factor = __ldg(plan.spectrum + by_columns.divide(index));
      data[padded(index)] = conj(cmul(data[padded(index)], factor));
    }
    __syncthreads();
    state = first_pass(plan, columns, 1);
  }
}

__device__ __forceinline__ float2 fft_result(const float2* data, const FftView& plan, int columns, int k, int c) {
  const float2 value = data[padded(k * columns + c)];
  return plan.m > plan.n ? cmul(conj(value), __ldg(plan.chirp + k)) : value;
}

}  // namespace fastmix
