// The SwiGLU activation, forward and backward: one pass over all tensors.
// docs/ops/swiglu.md#algorithm
#include <ssm/swiglu.h>

#include "../op/scratch.h"
#include "gate.h"
#include "rows.h"

namespace ssm::cpu::SSM_ISA {

namespace {

/// How the elements are cut: whole rows where they are short, else pieces of one row.
struct Cut {
    std::int64_t rows;
    std::int64_t dim;
    std::int64_t rows_per_task;
    std::int64_t columns_per_task;
    std::int64_t tasks_per_row;

    explicit Cut(const TensorView& gate) {
        const RowShape shape(gate);
        rows = shape.rows;
        dim = shape.dim;
        rows_per_task = max(1, kTaskElements / max(dim, 1));
        columns_per_task = min(max(dim, 1), kTaskElements);
        tasks_per_row = (dim + columns_per_task - 1) / columns_per_task;
    }
    std::int64_t tasks() const {
        return (rows + rows_per_task - 1) / rows_per_task * tasks_per_row;
    }
    int threads(int wanted) const { return rows * dim <= kSerialElements ? 1 : wanted; }
    /// Elements of a line of scratch.
    std::int64_t pitch() const { return (columns_per_task + 31) / 32 * 32; }

    /// Calls body(first row, end row, first column, columns) with the piece of a task.
    template <class Body>
    void visit(std::int64_t task, const Body& body) const {
        const std::int64_t row = task / tasks_per_row * rows_per_task;
        const std::int64_t column = task % tasks_per_row * columns_per_task;
        body(row, min(rows, row + rows_per_task), column, min(columns_per_task, dim - column));
    }
};

template <class T, class E>
void gate_row(const E* gate, const E* up, E* y, std::int64_t dim, bool past_caches) {
    sweep<T, kGates>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto v = silu(take<T>(gate + i, piece)) * take<T>(up + i, piece);
        put_past<T>(y + i, v, piece, past_caches);
    });
}

template <class T, class E>
void forward(const SwigluArgs& args, int threads) {
    const Cut cut(args.gate);
    const std::int64_t pitch = cut.pitch();
    threads = cut.threads(threads);
    const Scratch scratch(sizeof(E) * static_cast<std::size_t>(3 * pitch * threads));
    const bool past_caches = RowShape(args.y).streams<T, E>(args.y);
    parallel_for(cut.tasks(), threads, [&](std::int64_t task, int thread) {
        E* const lines = static_cast<E*>(scratch.data()) + 3 * pitch * thread;
        cut.visit(task,
                  [&](std::int64_t row, std::int64_t end, std::int64_t column, std::int64_t count) {
                      const RowLines<E> gate(args.gate, lines, count, column);
                      const RowLines<E> up(args.up, lines + pitch, count, column);
                      const RowLines<E> y(args.y, lines + 2 * pitch, count, column);
                      for (; row < end; ++row) {
                          E* const out = y.place(row);
                          gate_row<T>(gate.read(row), up.read(row), out, count, past_caches);
                          y.write(row, out);
                      }
                  });
        if (past_caches) end_streams();
    });
}

template <class T, class E>
void gate_row_grads(const E* gate, const E* up, const E* dy, E* dgate, E* dup, std::int64_t dim,
                    bool stream_dgate, bool stream_dup) {
    sweep<T, kGates>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto g = take<T>(gate + i, piece), d = take<T>(dy + i, piece);
        const auto s = sigmoid_factor(g), q = g * s;
        put_past<T>(dup + i, d * q, piece, stream_dup);
        const auto to_gate = d * take<T>(up + i, piece) * silu_slope(q, s);
        put_past<T>(dgate + i, to_gate, piece, stream_dgate);
    });
}

template <class T, class E>
void backward(const SwigluArgs& args, const SwigluGrads& grads, int threads) {
    const Cut cut(args.gate);
    const std::int64_t pitch = cut.pitch();
    threads = cut.threads(threads);
    const Scratch scratch(sizeof(E) * static_cast<std::size_t>(5 * pitch * threads));
    const RowShape shape(args.gate);
    const bool stream_dgate = shape.streams<T, E>(grads.dgate);
    const bool stream_dup = shape.streams<T, E>(grads.dup);
    parallel_for(cut.tasks(), threads, [&](std::int64_t task, int thread) {
        E* const lines = static_cast<E*>(scratch.data()) + 5 * pitch * thread;
        cut.visit(task,
                  [&](std::int64_t row, std::int64_t end, std::int64_t column, std::int64_t count) {
                      const RowLines<E> gate(args.gate, lines, count, column);
                      const RowLines<E> up(args.up, lines + pitch, count, column);
                      const RowLines<E> dy(grads.dy, lines + 2 * pitch, count, column);
                      const RowLines<E> dgate(grads.dgate, lines + 3 * pitch, count, column);
                      const RowLines<E> dup(grads.dup, lines + 4 * pitch, count, column);
                      for (; row < end; ++row) {
                          E *const to_gate = dgate.place(row), *const to_up = dup.place(row);
                          gate_row_grads<T>(gate.read(row), up.read(row), dy.read(row), to_gate,
                                            to_up, count, stream_dgate, stream_dup);
                          dgate.write(row, to_gate);
                          dup.write(row, to_up);
                      }
                  });
        if (stream_dgate || stream_dup) end_streams();
    });
}

}  // namespace

void swiglu_fwd(const SwigluArgs& args, int threads) {
    visit_rows({&args.gate, &args.up, &args.y}, [&](auto* acc, auto* element) {
        forward<std::decay_t<decltype(*acc)>, std::decay_t<decltype(*element)>>(args, threads);
    });
}

void swiglu_bwd(const SwigluArgs& args, const SwigluGrads& grads, int threads) {
    visit_rows({&args.gate, &args.up, &grads.dy, &grads.dgate, &grads.dup},
               [&](auto* acc, auto* element) {
                   backward<std::decay_t<decltype(*acc)>, std::decay_t<decltype(*element)>>(
                       args, grads, threads);
               });
}

}  // namespace ssm::cpu::SSM_ISA
