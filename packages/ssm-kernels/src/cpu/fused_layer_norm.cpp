// Residual addition with LayerNorm or RMSNorm, forward and backward. A task owns some rows; a row
// stays in the first-level cache between its passes. docs/ops/fused_layer_norm.md#algorithm
#include <ssm/fused_layer_norm.h>

#include <cmath>

#include "../op/scratch.h"
#include "parallel.h"
#include "tile.h"

namespace ssm::cpu::SSM_ISA {

namespace {

constexpr int kSums = 4;  // independent sums, so that additions overlap
constexpr std::int64_t kTaskElements = 16384;
constexpr std::int64_t kSerialElements = 32768;  // below, waking a thread costs more than it gains
constexpr std::int64_t kPartials = 64;           // partial sums of dweight and dbias
constexpr std::int64_t kPartialElements = 1 << 22;
constexpr std::int64_t kReduceColumns = 512;
// Outputs that cannot stay in any cache bypass them: the read for ownership is a third of a copy.
constexpr std::int64_t kStreamBytes = 16 << 20;

// A whole vector, or the `width` elements that are left at the end of a row.
struct Whole {};
struct Part {
    std::int64_t width;
};

template <class T>
SSM_INLINE Vec<T> take(const T* from, Whole) {
    return load<T>(from);
}
template <class T>
SSM_INLINE Vec<T> take(const T* from, Part part) {
    T lanes[kLanes<T>] = {};
    for (std::int64_t i = 0; i < part.width; ++i) lanes[i] = from[i];
    return load<T>(lanes);
}
template <class T>
SSM_INLINE void put(T* to, Vec<T> v, Whole) {
    store<T>(to, v);
}
template <class T>
SSM_INLINE void put(T* to, Vec<T> v, Part part) {
    T lanes[kLanes<T>];
    store<T>(lanes, v);
    for (std::int64_t i = 0; i < part.width; ++i) to[i] = lanes[i];
}
/// v with zeros in the lanes beyond the row's end.
template <class T>
SSM_INLINE Vec<T> inside(Vec<T> v, Whole) {
    return v;
}
template <class T>
SSM_INLINE Vec<T> inside(Vec<T> v, Part part) {
    for (std::int64_t i = part.width; i < kLanes<T>; ++i) v[i] = T(0);
    return v;
}

// Calls body(index, slot, Whole or Part) for the vectors of a row; slots go round 0..kSums-1.
template <class T, class Body>
SSM_INLINE void sweep(std::int64_t dim, const Body& body) {
    constexpr std::int64_t n = kLanes<T>;
    std::int64_t i = 0;
    for (; i + kSums * n <= dim; i += kSums * n) {
#pragma GCC unroll 4
        for (int slot = 0; slot < kSums; ++slot) body(i + slot * n, slot, Whole{});
    }
    // Slots stay constants here as well, or the sums would live in memory.
#pragma GCC unroll 4
    for (int slot = 0; slot < kSums; ++slot) {
        if (i + n <= dim) {
            body(i, slot, Whole{});
        } else if (i < dim) {
            body(i, slot, Part{dim - i});
        }
        i += n;
    }
}

template <class T>
struct Sums {
    Vec<T> part[kSums] = {};
    T total() const { return reduce_add<T>((part[0] + part[1]) + (part[2] + part[3])); }
};

/// A store that leaves the caches alone; `to` is aligned to whole vectors.
SSM_INLINE void stream(float* to, Vec<float> v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(to, (__m128)v);
#else
    store<float>(to, v);
#endif
}
SSM_INLINE void stream(double* to, Vec<double> v) { store<double>(to, v); }

SSM_INLINE void end_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Offset of a row in a view whose leading axes may not merge into one.
SSM_INLINE std::int64_t row_offset(const TensorView& view, std::int64_t row) {
    std::int64_t offset = 0;
    for (int axis = view.ndim - 2; axis > 0; --axis) {
        offset += row % view.shape[axis] * view.stride[axis];
        row /= view.shape[axis];
    }
    return offset + row * view.stride[0];
}

/// The rows of one tensor as arrays of the compute type: in place where they are that already, else
/// through a line of scratch.
template <class T>
struct Rows {
    const TensorView& view;
    T* line;
    std::int64_t dim;
    bool direct;

    Rows(const TensorView& tensor, T* scratch_line, std::int64_t columns)
        : view(tensor),
          line(scratch_line),
          dim(columns),
          direct(tensor.ndim >= 0 && tensor.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) &&
                 (columns == 1 || tensor.stride[tensor.ndim - 1] == 1)) {}

    bool given() const { return view.ndim >= 0; }
    T* place(std::int64_t row) const {
        return direct ? static_cast<T*>(view.data) + row_offset(view, row) : line;
    }
    Plane plane(std::int64_t row) const {
        return plane_at(view, row_offset(view, row), 0, view.stride[view.ndim - 1]);
    }
    const T* read(std::int64_t row) const {
        if (!direct) load_tile(line, 0, plane(row), 1, dim);
        return place(row);
    }
    /// Rounds `values` to the tensor's type, unless they were computed in place.
    void write(std::int64_t row, const T* values) const {
        if (!direct) {
            store_tile(plane(row), values, 0, 1, dim);
        } else if (T* to = place(row); to != values) {
            std::memcpy(to, values, sizeof(T) * static_cast<std::size_t>(dim));
        }
    }
};

/// What is read next: fetched while a pass works in the first-level cache, which would otherwise
/// leave the memory idle.
struct Ahead {
    const char* from = nullptr;
    std::int64_t element_bytes = 0;

    template <class T>
    Ahead(const Rows<T>& rows, std::int64_t row, std::int64_t end) {
        const TensorView& view = rows.view;
        if (!rows.given() || row >= end || view.stride[view.ndim - 1] != 1) return;
        from = static_cast<const char*>(rows.plane(row).data);
        element_bytes = dtype_bytes(view.dtype);
    }
    void fetch(std::int64_t i) const {
        if (from != nullptr) __builtin_prefetch(from + i * element_bytes);
    }
};

template <class T>
const T* dense(const TensorView& view, T* line, std::int64_t dim) {
    if (view.ndim < 0) return nullptr;
    return Rows<T>(view, line, dim).read(0);
}

template <class T>
SSM_INLINE T* statistic(const TensorView& view, std::int64_t row) {
    return static_cast<T*>(view.data) + row * view.stride[0];
}

struct NormShape {
    std::int64_t rows = 1;
    std::int64_t dim;
    std::int64_t pitch;  // elements of one scratch line

    explicit NormShape(const TensorView& x) : dim(x.shape[x.ndim - 1]) {
        for (int axis = 0; axis + 1 < x.ndim; ++axis) rows *= x.shape[axis];
        pitch = (dim + 31) / 32 * 32;
    }
    int threads(int wanted) const { return rows * dim <= kSerialElements ? 1 : wanted; }
    template <class T>
    bool streams(const TensorView& out) const {
        bool aligned = sizeof(T) == 4 && out.ndim >= 0 && out.dtype == DType::f32 &&
                       out.stride[out.ndim - 1] == 1 && dim % kLanes<T> == 0 &&
                       reinterpret_cast<std::uintptr_t>(out.data) % kVectorBytes == 0 &&
                       rows * dim * static_cast<std::int64_t>(sizeof(T)) >= kStreamBytes;
        for (int axis = 0; axis + 1 < out.ndim; ++axis)
            aligned = aligned && out.stride[axis] % kLanes<T> == 0;
        return aligned;
    }
};

// Forward ---------------------------------------------------------------------------------------

/// s = x + residual (residual may be null) into `sum` and, where given, past the caches into
/// `streamed`. Returns the sum of s, or of its squares.
template <class T>
T add_rows(const T* x, const T* residual, T* sum, T* streamed, std::int64_t dim, bool squares) {
    Sums<T> sums;
    sweep<T>(dim, [&](std::int64_t i, int slot, auto part) {
        Vec<T> s = take(x + i, part);
        if (residual != nullptr) s += take(residual + i, part);
        if (sum != nullptr) put<T>(sum + i, s, part);
        if constexpr (std::is_same_v<decltype(part), Whole>)
            if (streamed != nullptr) stream(streamed + i, s);
        sums.part[slot] += squares ? s * s : s;
    });
    return sums.total();
}

template <class T>
T squared_deviations(const T* s, T mean, std::int64_t dim, const Ahead& next) {
    Sums<T> sums;
    sweep<T>(dim, [&](std::int64_t i, int slot, auto part) {
        next.fetch(i);
        const Vec<T> d = inside<T>(take(s + i, part) - mean, part);
        sums.part[slot] += d * d;
    });
    return sums.total();
}

/// y = (s - mean) rstd weight + bias; bias may be null.
template <class T>
void scale_row(const T* s, T mean, T rstd, const T* weight, const T* bias, T* y, std::int64_t dim,
               bool past_caches, const Ahead& next) {
    sweep<T>(dim, [&](std::int64_t i, int, auto part) {
        next.fetch(i);
        Vec<T> v = (take(s + i, part) - mean) * rstd * take(weight + i, part);
        if (bias != nullptr) v += take(bias + i, part);
        if constexpr (std::is_same_v<decltype(part), Whole>)
            if (past_caches) return stream(y + i, v);
        put<T>(y + i, v, part);
    });
}

template <class T>
void norm_rows(const FusedLayerNormArgs& args, int wanted_threads) {
    const NormShape shape(args.x);
    const std::int64_t dim = shape.dim, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(pitch * (2 + 4 * threads)));
    T* const memory = static_cast<T*>(scratch.data());
    const T* const weight = dense(args.weight, memory, dim);
    const T* const bias = dense(args.bias, memory + pitch, dim);
    const bool stream_s = args.residual.ndim >= 0 && shape.streams<T>(args.residual_out);
    const bool stream_y = shape.streams<T>(args.y);
    const std::int64_t rows_per_task = max(1, kTaskElements / max(dim, 1));
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const T count = static_cast<T>(max(dim, 1)), eps = static_cast<T>(args.eps);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const lines = memory + pitch * (2 + 4 * thread);
        const Rows<T> x(args.x, lines, dim), residual(args.residual, lines + pitch, dim);
        const Rows<T> sum(args.residual_out, lines + 2 * pitch, dim),
            y(args.y, lines + 3 * pitch, dim);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const Ahead next_x(x, row + 1, end), next_residual(residual, row + 1, end);
            const T* s = x.read(row);
            T total;
            if (residual.given()) {
                T* const to = stream_s ? sum.line : sum.place(row);
                total = add_rows(s, residual.read(row), to, stream_s ? sum.place(row) : nullptr,
                                 dim, args.is_rms);
                s = to;
            } else {
                total = add_rows<T>(s, nullptr, nullptr, nullptr, dim, args.is_rms);
            }
            if (sum.given() && !stream_s) sum.write(row, s);
            const T mean = args.is_rms ? T(0) : total / count;
            const T squares = args.is_rms ? total : squared_deviations(s, mean, dim, next_residual);
            const T rstd = T(1) / std::sqrt(squares / count + eps);
            T* const out = y.place(row);
            scale_row(s, mean, rstd, weight, bias, out, dim, stream_y, next_x);
            y.write(row, out);
            if (args.mean.ndim >= 0) *statistic<T>(args.mean, row) = mean;
            if (args.rstd.ndim >= 0) *statistic<T>(args.rstd, row) = rstd;
        }
        if (stream_s || stream_y) end_streams();
    });
}

// Backward --------------------------------------------------------------------------------------

template <class T>
struct RowGrad {
    const T* s;
    const T* dy;
    const T* weight;
    T mean;
    T rstd;
};

/// Adds a row's part to dweight and dbias (null when not wanted) and returns mean(g xhat) and
/// mean(g) with g = dy weight.
template <class T>
void project_row(const RowGrad<T>& row, T* dweight, T* dbias, std::int64_t dim, T* along,
                 T* constant, const Ahead& ahead) {
    Sums<T> gx, g;
    sweep<T>(dim, [&](std::int64_t i, int slot, auto part) {
        ahead.fetch(i);
        const Vec<T> xhat = (take(row.s + i, part) - row.mean) * row.rstd;
        const Vec<T> dy = take(row.dy + i, part);
        const Vec<T> scaled = dy * take(row.weight + i, part);
        if (dweight != nullptr) put<T>(dweight + i, take(dweight + i, part) + dy * xhat, part);
        if (dbias != nullptr) put<T>(dbias + i, take(dbias + i, part) + dy, part);
        gx.part[slot] += inside<T>(scaled * xhat, part);
        g.part[slot] += scaled;
    });
    const T share = T(1) / static_cast<T>(dim);
    *along = gx.total() * share;
    *constant = g.total() * share;
}

/// ds = (g - mean(g) - xhat mean(g xhat)) rstd + dresidual_out (may be null).
template <class T>
void grad_row(const RowGrad<T>& row, T along, T constant, const T* dresidual_out, T* ds,
              std::int64_t dim, bool past_caches, const Ahead& next_s, const Ahead& next_dy) {
    const T slope = -row.rstd * row.rstd * along;
    sweep<T>(dim, [&](std::int64_t i, int, auto part) {
        next_s.fetch(i);
        next_dy.fetch(i);
        Vec<T> v = (take(row.s + i, part) - row.mean) * slope;
        if (dresidual_out != nullptr) v += take(dresidual_out + i, part);
        v += (take(row.dy + i, part) * take(row.weight + i, part) - constant) * row.rstd;
        if constexpr (std::is_same_v<decltype(part), Whole>)
            if (past_caches) return stream(ds + i, v);
        put<T>(ds + i, v, part);
    });
}

/// out = the sum of `count` lines, in their order.
template <class T>
void reduce_partials(const TensorView& out, const T* partials, std::int64_t pitch,
                     std::int64_t count, std::int64_t dim, int threads) {
    if (out.ndim < 0) return;
    parallel_for((dim + kReduceColumns - 1) / kReduceColumns, threads, [&](std::int64_t task, int) {
        const std::int64_t first = task * kReduceColumns, width = min(kReduceColumns, dim - first);
        T sum[kReduceColumns] = {};
        for (std::int64_t line = 0; line < count; ++line)
            for (std::int64_t i = 0; i < width; ++i) sum[i] += partials[line * pitch + first + i];
        store_tile(plane_at(out, first * out.stride[0], 0, out.stride[0]), sum, 0, 1, width);
    });
}

template <class T>
void norm_grads(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                int wanted_threads) {
    const NormShape shape(args.x);
    const std::int64_t dim = shape.dim, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    // The cut depends on the sizes only, and so do the sums.
    const std::int64_t most = max(1, min(kPartials, kPartialElements / max(dim, 1)));
    const std::int64_t rows_per_task = max(1, (shape.rows + most - 1) / most);
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const bool has_dweight = grads.dweight.ndim >= 0, has_dbias = grads.dbias.ndim >= 0;
    const Scratch scratch(sizeof(T) *
                          static_cast<std::size_t>(pitch * (1 + 5 * threads + 2 * tasks)));
    T* const memory = static_cast<T*>(scratch.data());
    T* const partials = memory + pitch * (1 + 5 * threads);
    const T* const weight = dense(args.weight, memory, dim);
    const bool stream_dx = grads.dresidual.ndim < 0 && shape.streams<T>(grads.dx);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const lines = memory + pitch * (1 + 5 * thread);
        const Rows<T> x(args.x, lines, dim), residual(args.residual, lines + pitch, dim);
        const Rows<T> dy(grads.dy, lines + 2 * pitch, dim);
        const Rows<T> dsum(grads.dresidual_out, lines + 3 * pitch, dim);
        const Rows<T> dx(grads.dx, lines + 4 * pitch, dim), dresidual(grads.dresidual, lines, dim);
        T* const dweight = has_dweight ? partials + pitch * task : nullptr;
        T* const dbias = has_dbias ? partials + pitch * (tasks + task) : nullptr;
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(dim);
        if (has_dweight) std::memset(dweight, 0, bytes);
        if (has_dbias) std::memset(dbias, 0, bytes);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const T* s = x.read(row);
            if (residual.given()) {
                add_rows<T>(s, residual.read(row), lines, nullptr, dim, false);
                s = lines;
            }
            const RowGrad<T> at{s, dy.read(row), weight,
                                args.is_rms ? T(0) : *statistic<T>(args.mean, row),
                                *statistic<T>(args.rstd, row)};
            T along, constant;
            project_row(at, dweight, dbias, dim, &along, &constant, Ahead(dsum, row, end));
            T* const ds = dx.place(row);
            grad_row(at, along, args.is_rms ? T(0) : constant,
                     dsum.given() ? dsum.read(row) : nullptr, ds, dim, stream_dx,
                     Ahead(x, row + 1, end), Ahead(dy, row + 1, end));
            // dx last: it may be rounded in place of ds.
            if (dresidual.given()) dresidual.write(row, ds);
            dx.write(row, ds);
        }
        if (stream_dx) end_streams();
    });
    reduce_partials(grads.dweight, partials, pitch, tasks, dim, threads);
    reduce_partials(grads.dbias, partials + pitch * tasks, pitch, tasks, dim, threads);
}

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& args, int threads) {
    if (args.x.dtype == DType::f64)
        norm_rows<double>(args, threads);
    else
        norm_rows<float>(args, threads);
}

void fused_layer_norm_bwd(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                          int threads) {
    if (args.x.dtype == DType::f64)
        norm_grads<double>(args, grads, threads);
    else
        norm_grads<float>(args, grads, threads);
}

}  // namespace ssm::cpu::SSM_ISA
