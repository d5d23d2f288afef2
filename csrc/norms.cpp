#include "norms.hpp"

#include "cpu.hpp"
#include "programs.hpp"
#include "python_driver.hpp"

namespace fusedopt {

void SquareSums::pass(const std::vector<Measured*>& inputs, int threads, ThreadChoice* choice) {
  const Operation& squares = operation_named(*level().table, "squares");
  static constexpr std::uint8_t ORDER[] = {0, 1};  // the sum, the input
  static constexpr float ONE = 1;
  leaves_.resize(inputs.size());
  steps_.resize(inputs.size());
  operands_.resize(2 * inputs.size());
  partials_.clear();
  std::size_t elements = 0;
  for (std::size_t k = 0; k < inputs.size(); ++k) {
    const Measured& m = *inputs[k];
    Operand* const operands = &operands_[2 * k];
    put(operands[0].role, Role::SUMS);
    put(operands[1].role, m.input->role);
    put(operands[1].data, m.input->data);
    put(operands[1].decode, m.input->decode);
    put(operands[1].bits, m.input->bits);
    Step& step = steps_[k];
    put(step.run, squares.compute[m.compute].mode[PLAIN]);
    put(step.scalars, m.compute == F32 ? static_cast<const void*>(&ONE) : &m.scale);
    put<const std::uint8_t*>(step.operands, ORDER);
    put(step.operand_count, 2);
    Leaf& leaf = leaves_[k];
    put(leaf.elements, m.elements);
    put<const Operand*>(leaf.operands, operands);
    put<const Step*>(leaf.steps, &step);
    put(leaf.operand_count, 2);
    put(leaf.step_count, 1);
    put(leaf.used, 3u);
    put(leaf.summed, 1u);
    put(leaf.rows, m.rows);
    partials_.add(leaf, operands);
    elements += m.elements;
  }
  partials_.place();
  run_unlocked(leaves_, elements, threads, nullptr, choice);
  for (std::size_t k = 0; k < inputs.size(); ++k) inputs[k]->sum = Partials::total(leaves_[k], 0);
}

void SquareSums::find(std::vector<Measured>& inputs, int threads, ThreadChoice* choice) {
  all_.clear();
  again_.clear();
  for (Measured& m : inputs) all_.push_back(&m);
  pass(all_, threads, choice);
  for (Measured& m : inputs) {
    if (m.compute != F64 || (m.sum >= 0x1p-900 && m.sum <= 0x1p1023)) continue;
    m.scale = m.sum < 1 ? 0x1p600 : 0x1p-600;
    again_.push_back(&m);
  }
  if (!again_.empty()) pass(again_, threads, nullptr);
}

}  // namespace fusedopt
