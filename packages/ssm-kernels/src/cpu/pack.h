// Packs: several vectors that go through every operation together. One chain of operations waits
// for itself, and the processor does not look far enough ahead to start the next one.
#pragma once

#include "tile.h"
#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

template <class T, int kCount>
struct Pack {
    Vec<T> v[kCount];
};

#define SSM_PACK_OPERATOR(op)                                                             \
    template <class T, int kCount>                                                        \
    SSM_INLINE Pack<T, kCount> operator op(Pack<T, kCount> a, const Pack<T, kCount>& b) { \
        SSM_EACH(i) a.v[i] = a.v[i] op b.v[i];                                            \
        return a;                                                                         \
    }                                                                                     \
    template <class T, int kCount>                                                        \
    SSM_INLINE Pack<T, kCount> operator op(Pack<T, kCount> a, T b) {                      \
        SSM_EACH(i) a.v[i] = a.v[i] op b;                                                 \
        return a;                                                                         \
    }
SSM_PACK_OPERATOR(+)
SSM_PACK_OPERATOR(-)
SSM_PACK_OPERATOR(*)
#undef SSM_PACK_OPERATOR

/// `kCount` whole vectors, or the `width` elements that are left at the end of a row.
template <int kCount>
struct Whole {};
struct Part {
    std::int64_t width;
};

template <class T, class E, int kCount>
SSM_INLINE Pack<T, kCount> take(const E* from, Whole<kCount>) {
    Pack<T, kCount> p;
    SSM_EACH(i) p.v[i] = widen_vector<T>(from + i * kLanes<T>);
    return p;
}
template <class T, class E>
SSM_INLINE Pack<T, 1> take(const E* from, Part part) {
    E lanes[kLanes<T>] = {};
    for (std::int64_t i = 0; i < part.width; ++i) lanes[i] = from[i];
    return {{widen_vector<T>(lanes)}};
}
// Whether two vectors are narrowed together.
template <class T, class E, int kCount>
constexpr bool kPairs = kHasLanes<T, E> && std::is_same_v<E, BFloat16> && kCount % 2 == 0;
// Elements of the widest store of put_past(): what it writes past the caches begins at a multiple.
template <class T, class E>
constexpr int kStreamed = kPairs<T, E, 2> ? 2 * kLanes<T> : kLanes<T>;

template <class T, class E, int kCount>
SSM_INLINE void put(E* to, const Pack<T, kCount>& p, Whole<kCount>) {
    if constexpr (kPairs<T, E, kCount>) {
        for (int i = 0; i < kCount; i += 2) {
            const Words pair = narrow_pair(p.v[i], p.v[i + 1]);
            std::memcpy(to + i * kLanes<T>, &pair, sizeof pair);
        }
    } else {
        SSM_EACH(i) narrow_vector<T>(to + i * kLanes<T>, p.v[i]);
    }
}
template <class T, class E>
SSM_INLINE void put(E* to, const Pack<T, 1>& p, Part part) {
    E lanes[kLanes<T>];
    narrow_vector<T>(lanes, p.v[0]);
    for (std::int64_t i = 0; i < part.width; ++i) to[i] = lanes[i];
}
/// p with zeros in the lanes beyond the row's end.
template <class T, int kCount>
SSM_INLINE Pack<T, kCount> inside(const Pack<T, kCount>& p, Whole<kCount>) {
    return p;
}
template <class T>
SSM_INLINE Pack<T, 1> inside(Pack<T, 1> p, Part part) {
    for (std::int64_t i = part.width; i < kLanes<T>; ++i) p.v[0][i] = T(0);
    return p;
}

#if defined(__x86_64__)
SSM_INLINE void stream_bytes(void* to, __m128i v) {
    _mm_stream_si128(static_cast<__m128i*>(to), v);
}
#if defined(__AVX2__)
SSM_INLINE void stream_bytes(void* to, __m256i v) {
    _mm256_stream_si256(static_cast<__m256i*>(to), v);
}
#endif
#if defined(__AVX512F__)
SSM_INLINE void stream_bytes(void* to, __m512i v) {
    _mm512_stream_si512(static_cast<__m512i*>(to), v);
}
#endif
#endif

template <int kBytes>
struct StreamOf {
    typedef long long type __attribute__((vector_size(kBytes)));
};

/// A store that leaves the caches alone, where the instruction set has one of that width; `to` is
/// aligned to what a vector of T takes as E.
template <class T, class E>
SSM_INLINE void stream(E* to, Vec<T> v) {
#if defined(__x86_64__)
    constexpr int bytes = kLanes<T> * static_cast<int>(sizeof(E));
    if constexpr (bytes >= 16) {
        E lanes[kLanes<T>];
        narrow_vector<T>(lanes, v);
        typename StreamOf<bytes>::type rounded;
        std::memcpy(&rounded, lanes, sizeof rounded);
        return stream_bytes(to, rounded);
    }
#endif
    narrow_vector<T>(to, v);
}

SSM_INLINE void end_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/// put(), or past the caches where `past_caches` says so.
template <class T, class E, int kCount>
SSM_INLINE void put_past(E* to, const Pack<T, kCount>& p, Whole<kCount> whole, bool past_caches) {
    if (!past_caches) return put<T>(to, p, whole);
    if constexpr (kPairs<T, E, kCount>) {
        for (int i = 0; i < kCount; i += 2) {
            const Words pair = narrow_pair(p.v[i], p.v[i + 1]);
            stream_bytes(to + i * kLanes<T>, (StreamOf<kVectorBytes>::type)pair);
        }
        return;
    }
    SSM_EACH(i) stream<T>(to + i * kLanes<T>, p.v[i]);
}
template <class T, class E>
SSM_INLINE void put_past(E* to, const Pack<T, 1>& p, Part part, bool) {
    put<T>(to, p, part);
}

/// Calls body(index, Whole or Part) for the packs of a row.
template <class T, int kCount, class Body>
SSM_INLINE void sweep(std::int64_t dim, const Body& body) {
    constexpr std::int64_t n = kLanes<T>;
    std::int64_t i = 0;
    for (; i + kCount * n <= dim; i += kCount * n) body(i, Whole<kCount>{});
    for (; kCount > 1 && i + n <= dim; i += n) body(i, Whole<1>{});
    if (i < dim) body(i, Part{dim - i});
}

/// Sums over the packs of a row, in a fixed order.
template <class T, int kWidth>
struct Sums {
    Vec<T> part[kWidth] = {};
    template <int kCount>
    void add(const Pack<T, kCount>& p) {
        SSM_EACH(i) part[i] += p.v[i];
    }
    T total() const {
        Vec<T> sum = part[0];
        for (int i = 1; i < kWidth; ++i) sum += part[i];
        return reduce_add<T>(sum);
    }
};

}  // namespace ssm::cpu::SSM_ISA
