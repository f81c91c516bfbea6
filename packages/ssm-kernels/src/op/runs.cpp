#include "runs.h"

#include <unordered_set>
#include <vector>

#include "check.h"

namespace ssm {

struct RunTable::Storage {
    std::vector<Run> runs;
    std::vector<std::int64_t> row_begin;
};

RunTable::~RunTable() = default;

RunTable::RunTable(const char* op, const TensorView& seq_idx, std::int64_t batch,
                   std::int64_t seqlen, bool state_per_sequence, std::int64_t num_states)
    : storage_(std::make_unique<Storage>()) {
    std::vector<Run>& runs = storage_->runs;
    std::vector<std::int64_t>& row_begin = storage_->row_begin;
    row_begin.reserve(static_cast<std::size_t>(batch) + 1);
    row_begin.push_back(0);
    std::unordered_set<std::int32_t> seen;
    for (std::int64_t row = 0; row < batch; ++row) {
        const auto first = static_cast<std::int64_t>(runs.size());
        if (!present(seq_idx)) {
            if (seqlen > 0) runs.push_back({0, seqlen, row, row});
        } else {
            const auto* ids =
                static_cast<const std::int32_t*>(seq_idx.data) + row * seq_idx.stride[0];
            std::int32_t current = -1;  // sequence of the last step that was not skipped
            bool open = false;
            for (std::int64_t t = 0; t < seqlen; ++t) {
                const std::int32_t id = ids[t * seq_idx.stride[1]];
                if (id < -1) fail(op, "seq_idx", "be -1 or a sequence number", std::to_string(id));
                if (id == -1) {
                    open = false;
                    continue;
                }
                if (open && id == current) {
                    runs.back().end = t + 1;
                    continue;
                }
                std::int64_t state_in = Run::kContinue;
                if (id != current) {
                    if (state_per_sequence) {
                        if (num_states != kAnyNumber && id >= num_states)
                            fail(op, "seq_idx",
                                 "be below the number of states " + std::to_string(num_states),
                                 std::to_string(id));
                        if (!seen.insert(id).second)
                            fail(op, "seq_idx", "keep each sequence in one place",
                                 "sequence " + std::to_string(id) + " again at row " +
                                     std::to_string(row));
                        state_in = id;
                    } else {
                        state_in = current == -1 ? row : Run::kZero;
                    }
                }
                // The state leaves with the last run of its sequence; an earlier one hands it on.
                const std::int64_t state_out = state_per_sequence ? id : row;
                if (static_cast<std::int64_t>(runs.size()) > first &&
                    (state_in == Run::kContinue || !state_per_sequence))
                    runs.back().state_out = Run::kNone;
                runs.push_back({t, t + 1, state_in, state_out});
                current = id;
                open = true;
            }
        }
        row_begin.push_back(static_cast<std::int64_t>(runs.size()));
    }
    view_ = {runs.data(), row_begin.data(), !present(seq_idx)};
}

}  // namespace ssm
