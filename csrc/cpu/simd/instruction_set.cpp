#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lambda_return::cpu {
namespace {

const InstructionSet& choose() {
  const InstructionSet* const widest_first[] = {avx512(), avx2(), portable()};
  const char* wanted = std::getenv("LAMBDA_RETURN_ISA");
  std::string available;
  for (const InstructionSet* set : widest_first) {
    if (set != nullptr) {
      if (wanted == nullptr || *wanted == 0 || std::string(wanted) == set->name) {
        return *set;
      }
      available += std::string(available.empty() ? "" : ", ") + set->name;
    }
  }
  throw std::runtime_error(
      "LAMBDA_RETURN_ISA must be one of the instruction sets of this processor, " + available + ", got " + wanted);
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace lambda_return::cpu
