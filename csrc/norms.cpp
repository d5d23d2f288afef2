#include "norms.hpp"

#include "cpu.hpp"
#include "programs.hpp"
#include "python_driver.hpp"

namespace fusedopt {
namespace {

void square_sums(const std::vector<Measured*>& inputs, int threads, ThreadChoice* choice) {
  const Operation& squares = operation_named(*level().table, "squares");
  constexpr std::uint8_t ORDER[] = {0, 1};  // the sum, the input
  std::vector<Leaf> leaves;
  std::vector<Step> steps;
  std::vector<Operand> operands;
  std::vector<float> narrow(inputs.size(), 1.0f);
  Partials partials;
  steps.reserve(inputs.size());
  operands.reserve(2 * inputs.size());
  std::size_t elements = 0;
  for (std::size_t k = 0; k < inputs.size(); ++k) {
    const Measured& m = *inputs[k];
    Operand sum;
    sum.role = Role::SUMS;
    operands.push_back(sum);
    operands.push_back(m.input);
    const void* const scalars = m.compute == F32 ? static_cast<const void*>(&narrow[k]) : &m.scale;
    steps.push_back({squares.compute[m.compute].mode[PLAIN], scalars, ORDER, 2});
    leaves.push_back({m.elements, &operands[2 * k], &steps[k], 2, 1, 3, 0, 1, m.rows, 0});
    partials.add(leaves.back(), &operands[2 * k]);
    elements += m.elements;
  }
  partials.place();
  run_unlocked(leaves, elements, threads, nullptr, choice);
  for (std::size_t k = 0; k < inputs.size(); ++k)
    inputs[k]->sum = Partials::total(leaves[k], operands[2 * k]);
}

}  // namespace

void measure(std::vector<Measured>& inputs, int threads, ThreadChoice* choice) {
  std::vector<Measured*> all, again;
  for (Measured& m : inputs) all.push_back(&m);
  square_sums(all, threads, choice);
  for (Measured& m : inputs) {
    if (m.compute != F64 || (m.sum >= 0x1p-900 && m.sum <= 0x1p1023)) continue;
    m.scale = m.sum < 1 ? 0x1p600 : 0x1p-600;
    again.push_back(&m);
  }
  if (!again.empty()) square_sums(again, threads, nullptr);
}

}  // namespace fusedopt
