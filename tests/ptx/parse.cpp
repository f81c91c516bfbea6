// Reads what nvcc writes: modules, kernels, instructions. PTX ISA 9.0, chapters 4 and 5.
#include <algorithm>
#include <cctype>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace ptx {

namespace {

std::string trimmed(const std::string& text) {
    const std::size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n");
    return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

/// Parts between commas that are not inside of brackets.
std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (const char letter : text) {
        depth += (letter == '{' || letter == '[') - (letter == '}' || letter == ']');
        if (letter == ',' && depth == 0)
            parts.push_back(trimmed(std::exchange(part, "")));
        else
            part += letter;
    }
    if (!trimmed(part).empty()) parts.push_back(trimmed(part));
    return parts;
}

class Parser {
  public:
    explicit Parser(Kernel& kernel) : kernel_(kernel) {}

    void run() {
        const std::string& text = kernel_.text;
        for (std::size_t at = 0; at < text.size();) {
            // Braces alone are scopes, of registers whose names are not used twice at a time.
            if (std::isspace(static_cast<unsigned char>(text[at])) || text[at] == '{' ||
                text[at] == '}') {
                ++at;
            } else if (text.compare(at, 2, "//") == 0) {
                at = std::min(text.find('\n', at), text.size());
            } else if (text[at] == '$') {
                const std::size_t end = text.find(':', at);
                labels_[text.substr(at, end - at)] = static_cast<int>(code_.size());
                at = end + 1;
            } else {
                const std::size_t end = text.find(';', at);
                statement(text.substr(at, end - at));
                at = end + 1;
            }
        }
        Instruction end;
        end.kind = Kind::end;
        code_.push_back(end);
        for (const auto& [at, label] : jumps_) code_[at].target = labels_.at(label);
        kernel_.code = std::move(code_);
        kernel_.text.clear();
    }

  private:
    int new_register(auto& names, const auto& name) {
        const auto [found, is_new] = names.try_emplace(name, kernel_.registers);
        kernel_.registers += is_new;
        return found->second;
    }

    int operand(const std::string& text) {
        if (text == "%tid.x" || text == "%ntid.x" || text == "%ctaid.x" || text == "%nctaid.x")
            return new_register(kernel_.specials, text);
        for (const Parameter& parameter : kernel_.parameters)
            if (parameter.name == text) return new_register(kernel_.specials, text);
        if (text[0] == '%' || registers_.count(text) != 0) return new_register(registers_, text);
        std::uint64_t number = kSharedBase;
        if (text.starts_with("0f") || text.starts_with("0d"))
            number = std::stoull(text.substr(2), nullptr, 16);
        else if (text[0] == '-')
            number = static_cast<std::uint64_t>(std::stoll(text, nullptr, 0));
        else if (std::isdigit(static_cast<unsigned char>(text[0])))
            number = std::stoull(text, nullptr, 0);
        else if (text != kernel_.shared)
            fault("unknown operand " + text);
        return new_register(kernel_.numbers, number);
    }

    void operands(Instruction& in, const std::string& text) {
        for (const std::string& part : split(text)) {
            if (part[0] == '{') {
                for (const auto& element : split(part.substr(1, part.size() - 2)))
                    in.operands.push_back(operand(element));
            } else if (part[0] == '[') {
                const std::size_t plus = part.find('+');
                const std::size_t end = std::min(plus, part.size() - 1);
                in.operands.push_back(operand(trimmed(part.substr(1, end - 1))));
                if (plus != std::string::npos) in.offset = std::stoll(part.substr(plus + 1));
            } else if (const std::size_t bar = part.find('|'); bar != std::string::npos) {
                in.operands.push_back(operand(part.substr(0, bar)));
                in.operands.push_back(operand(part.substr(bar + 1)));
            } else {
                in.operands.push_back(operand(part));
            }
            if (in.first == 0) in.first = static_cast<int>(in.operands.size());
        }
    }

    void statement(const std::string& written) {
        std::string text = trimmed(written);
        if (text.starts_with(".reg")) {  // those without a % have to be known
            const std::size_t type = text.find_first_not_of(" \t", 4);
            for (const auto& name : split(text.substr(text.find_first_of(" \t", type))))
                new_register(registers_, name);
            return;
        }
        if (text.empty() || text[0] == '.') return;  // another directive
        Instruction in;
        in.text = text.substr(0, 100);
        if (text[0] == '@') {
            in.negated = text[1] == '!';
            const std::size_t end = text.find_first_of(" \t");
            in.predicate = operand(text.substr(1 + in.negated, end - 1 - in.negated));
            text = trimmed(text.substr(end));
        }
        const std::size_t end = std::min(text.find_first_of(" \t"), text.size());
        const std::string opcode = text.substr(0, end), rest = trimmed(text.substr(end));
        if (opcode == "bra" || opcode == "bra.uni") {
            in.kind = Kind::branch;
            jumps_.emplace_back(code_.size(), rest);
        } else if (opcode == "ret") {
            in.kind = Kind::end;
        } else {
            operands(in, rest);
            if (opcode == "bar.sync")
                in.kind = Kind::barrier;
            else if (!know_arithmetic(opcode, in) && !know_memory(opcode, in) &&
                     !know_warp(opcode, in) && !know_warpgroup(opcode, in))
                fault("unknown instruction " + text);
            kernel_.on_warpgroups |= opcode.starts_with("wgmma");
        }
        code_.push_back(std::move(in));
    }

    Kernel& kernel_;
    std::vector<Instruction> code_;
    std::unordered_map<std::string, int> registers_, labels_;
    std::vector<std::pair<std::size_t, std::string>> jumps_;
};

/// The end of the brace that begins at `at`.
std::size_t end_of_body(const std::string& module, std::size_t at) {
    int depth = 0;
    for (; at < module.size(); ++at) {
        if (module.compare(at, 2, "//") == 0) at = module.find('\n', at);
        depth += (module[at] == '{') - (module[at] == '}');
        if (depth == 0) break;
    }
    return at;
}

void add_parameter(Kernel& kernel, const std::string& text) {
    // .param .u64 NAME, or .param .align 8 .b8 NAME[BYTES]
    const std::size_t bracket = text.find('[');
    const std::string named = text.substr(0, bracket);
    const std::size_t name = named.find_last_of(" \t") + 1;
    const bool is_struct = bracket != std::string::npos;
    const std::size_t type = text.find(is_struct ? ".align " : ".", text.find(".param") + 1);
    const std::size_t bytes =
        is_struct ? std::stoul(text.substr(bracket + 1)) : std::stoul(text.substr(type + 2)) / 8;
    const std::size_t align = is_struct ? std::stoul(text.substr(type + 7)) : bytes;
    const std::size_t offset = (kernel.parameter_bytes + align - 1) / align * align;
    kernel.parameters.push_back({named.substr(name), bytes, offset});
    kernel.parameter_bytes = offset + bytes;
}

}  // namespace

std::map<std::string, Kernel> kernels_of(const std::string& module) {
    std::map<std::string, Kernel> kernels;
    std::string shared;
    if (const std::size_t at = module.find(".extern .shared"); at != std::string::npos) {
        const std::size_t end = module.find('[', at), name = module.rfind(' ', end) + 1;
        shared = module.substr(name, end - name);
    }
    const std::string entry = ".entry ";
    for (std::size_t at = module.find(entry); at != std::string::npos;
         at = module.find(entry, at)) {
        at += entry.size();
        const std::size_t open = module.find('(', at), close = module.find(')', open);
        Kernel kernel;
        kernel.name = module.substr(at, open - at);
        kernel.shared = shared;
        for (const auto& part : split(module.substr(open + 1, close - open - 1)))
            add_parameter(kernel, part);
        const std::size_t body = module.find("\n{", close) + 1;
        const std::string bound = ".maxntid ";
        if (const std::size_t most = module.find(bound, close); most < body)
            kernel.most_threads =
                static_cast<std::uint32_t>(std::stoul(module.substr(most + bound.size())));
        at = end_of_body(module, body);
        kernel.text = module.substr(body, at - body);
        kernels.emplace(kernel.name, std::move(kernel));
    }
    return kernels;
}

void parse(Kernel& kernel) { Parser(kernel).run(); }

}  // namespace ptx
