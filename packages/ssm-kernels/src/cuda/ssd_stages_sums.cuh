// The first stage of the state-space dual scan, backward, and sums of what several blocks give to
// one number.
#pragma once

#include "ssd_stages_tile.cuh"

namespace ssm::cuda {

/// ddt, and dA and ddt_bias of each chunk: a step stands in its own sum and in all that follow.
template <class Real>
struct DifferentiateSums {
    static constexpr int kThreads = 128, kWarps = kThreads / kWarp;
    static constexpr int kBlocksPerUnit = 4;
    static constexpr int kHeads = kWarp, kOwn = kHeads / kWarps;  // of a block, and of a warp
    static constexpr int kAcross = kHeads + 1;                    // between steps in shared memory

    struct Registers {
        double total, dA, dbias;  // of a head of the warp: the lane says which
    };

    Plane<3> dt, ddt;
    Plane<1> A, dt_bias;
    StageIds ids;
    Plane<4> ddt_out, ddA_cumsum;
    std::int64_t batch, seqlen, heads, chunks, size, parts;
    double dt_low, dt_high;
    bool softplus;
    double *dA, *dbias;  // (H, B, C)

    std::int64_t blocks() const { return batch * chunks * parts; }
    std::int64_t shared_size() const { return kStageTile * kAcross; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        StageIndex rest{index};
        const std::int64_t first_head = rest.next(parts) * kHeads, chunk = rest.next(chunks);
        const std::int64_t row = rest.rest, first = chunk * size;
        block.each([&](int, Registers& r) { r.total = r.dA = r.dbias = 0; });
        for (std::int64_t place = (size - 1) / kStageTile * kStageTile; place >= 0;
             place -= kStageTile) {
            const auto each = [&](int thread, const auto& use) {
                SSM_UNROLL_TWICE
                for (int i = thread; i < kStageTile * kHeads; i += kThreads) {
                    const std::int64_t step = first + place + i / kHeads;
                    const std::int64_t head = first_head + i % kHeads;
                    if (place + i / kHeads < size && step < seqlen && head < heads)
                        use(i / kHeads * kAcross + i % kHeads, step, head);
                }
            };
            block.each([&](int thread, Registers&) {
                each(thread, [&](int to, std::int64_t step, std::int64_t head) {
                    Real raw = dt.template load<Real>(offset(dt, row, step, head));
                    if (dt_bias) raw += dt_bias.template load<Real>(head * dt_bias.stride[0]);
                    block.write(to, raw);
                });
            });
            block.barrier();
            block.each_warp([&](auto& warp) {
                SSM_ROLLED
                for (int i = 0; i < kOwn; ++i) {
                    if (first_head + warp.index * kOwn + i >= heads) break;
                    for (int half = kStageTile - kWarp; half >= 0; half -= kWarp)
                        if (place + half < size)
                            add_steps(block, warp, i, first_head, row, chunk, place, half);
                }
            });
            block.barrier();
            block.each([&](int thread, Registers&) {
                each(thread, [&](int from, std::int64_t step, std::int64_t head) {
                    ddt.store(offset(ddt, row, step, head), block.read(from));
                });
            });
            block.barrier();
        }
        block.each([&](int thread, Registers& r) {
            const std::int64_t head = first_head + thread / kWarp * kOwn + thread % kWarp;
            if (thread % kWarp >= kOwn || head >= heads) return;
            const std::int64_t line = (head * batch + row) * chunks + chunk;
            dA[line] = r.dA, dbias[line] = r.dbias;
        });
    }

  private:
    static SSM_DEVICE std::int64_t offset(const Plane<3>& tensor, std::int64_t row,
                                          std::int64_t step, std::int64_t head) {
        return row * tensor.stride[0] + step * tensor.stride[1] + head * tensor.stride[2];
    }

    /// The gradients of 32 steps of one head take the place of what their sizes are made of. The
    /// first lane has the last step.
    template <class Block, class Warp>
    SSM_DEVICE void add_steps(Block& block, Warp& warp, int own, std::int64_t first_head,
                              std::int64_t row, std::int64_t chunk, std::int64_t place,
                              int half) const {
        const std::int64_t head = first_head + warp.index * kOwn + own;
        const double rate = A.template load<Real>(head * A.stride[0]);
        struct Sum {
            double upto, all;  // of the steps of this call, and with those behind them
            double dA, dbias;
        };
        PerLane<Sum> lanes;
        const auto step_of = [&](int lane) { return half + kWarp - 1 - lane; };
        warp.each([&](int lane, Registers&) {
            const std::int64_t step = place + step_of(lane);
            lanes(lane).upto =
                ddA_cumsum && step < size
                    ? ddA_cumsum.template load<Real>(line_at(ddA_cumsum, row, head, chunk, step))
                    : Real(0);
        });
        warp.prefix_sum([&](int lane) -> double& { return lanes(lane).upto; });
        warp.each([&](int lane, Registers& r) { lanes(lane).all = r.total; });
        warp.broadcast(own, [&](int lane) -> double& { return lanes(lane).all; });
        warp.each([&](int lane, Registers&) {
            Sum& sum = lanes(lane);
            sum.all += sum.upto;
            sum.dA = sum.dbias = 0;
            const std::int64_t step = place + step_of(lane), t = chunk * size + step;
            if (step >= size || t >= seqlen) return;
            const int at = step_of(lane) * kAcross + warp.index * kOwn + own;
            const Real raw = block.read(at);
            Real gradient = 0;
            if (sequence_at(ids, row, t) >= 0) {
                if (ddt_out)
                    gradient =
                        ddt_out.template load<Real>(line_at(ddt_out, row, head, chunk, step));
                gradient += static_cast<Real>(rate * sum.all);
                sum.dA = static_cast<double>(step_size(*this, raw)) * sum.all;
                // A clamped step size has no gradient; at the limits themselves it has.
                const Real unclamped = softplus ? cuda::softplus(raw) : raw;
                const bool passes = unclamped >= static_cast<Real>(dt_low) &&
                                    unclamped <= static_cast<Real>(dt_high);
                gradient = passes ? gradient * (softplus ? sigmoid(raw) : Real(1)) : Real(0);
                sum.dbias = gradient;
            }
            block.write(at, gradient);
        });
        warp.prefix_sum([&](int lane) -> double& { return lanes(lane).dA; });
        warp.prefix_sum([&](int lane) -> double& { return lanes(lane).dbias; });
        const auto share = [&](auto member) {
            warp.broadcast(kWarp - 1, [&](int lane) -> double& { return lanes(lane).*member; });
        };
        share(&Sum::all), share(&Sum::dA), share(&Sum::dbias);
        warp.each([&](int lane, Registers& r) {
            if (lane != own) return;
            r.total = lanes(lane).all;
            r.dA += lanes(lane).dA, r.dbias += lanes(lane).dbias;
        });
    }
};

/// Sums of lines in their order, by one warp each: out[i] = sum of from[i count + ...].
template <class Real, class Term>
struct AddLines {
    static constexpr int kThreads = 128, kLines = kThreads / kWarp;
    static constexpr int kBlocksPerUnit = 8;
    struct Registers {};

    const Term* from;  // (outer, count, inner)
    Plane<2> to;       // (outer, inner)
    std::int64_t outer, count, inner;

    std::int64_t blocks() const { return (outer * inner + kLines - 1) / kLines; }
    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each_warp([&](auto& warp) {
            const std::int64_t line = index * kLines + warp.index;
            if (line >= outer * inner) return;
            const std::int64_t first = quotient(line, inner), place = line - first * inner;
            PerLane<double> sums;
            warp.each([&](int lane, Registers&) {
                double sum = 0;
                for (std::int64_t i = lane; i < count; i += kWarp)
                    sum += from[(first * count + i) * inner + place];
                sums(lane) = sum;
            });
            warp.prefix_sum([&](int lane) -> double& { return sums(lane); });
            warp.each([&](int lane, Registers&) {
                if (lane == kWarp - 1)
                    to.store(first * to.stride[0] + place * to.stride[1],
                             static_cast<Real>(sums(lane)));
            });
        });
    }
};

}  // namespace ssm::cuda
