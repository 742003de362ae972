// Which states a step reads and keeps; crate::StepStates.
#pragma once
#include "common.h"

struct States {
  const int* begins;       // [rows + 1]: the first token of each row
  const int* slots;        // [rows]: the slot that is the row's own
  const int* goes_on;      // [rows]: 0: it begins from zeros, not from its slot
  const int* save_begins;  // [rows + 1]: where those of a row begin in `saves`
  const int2* saves;       // (token, slot), by token: the state is kept that has seen it
};
