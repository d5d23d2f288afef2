// Which instruction sets this build holds, which this machine has, and which one is in use.
#pragma once
#include <string>
#include <vector>

#include "table.h"

namespace fusedopt {

struct Level {
  const char* name;
  const Table* table;
  bool (*supported)();
};

// Lowest first; only those that the machine supports.
const std::vector<Level>& levels();

// The level in use: the highest, until `force_level` says otherwise.
const Level& level();
bool force_level(const std::string& name);

// Whether the processor has AMX's tiles and its bfloat16, and the operating system lets this
// process use them: their registers are large, so Linux has each process ask for them, which this
// does.
bool has_amx();

}  // namespace fusedopt
