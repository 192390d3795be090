// The mainloop of Hopper's kernels: persistent, warp-specialised, pipelined.
//
// A thread block stays on its multiprocessor and works through items (output tiles). One thread, the producer, reads
// the index, posts items and copies their operands into a ring of stages. Two consumer warpgroups multiply, each its
// half of every tile's columns. Both read the same left operand, the weight's: a tile this wide saves reads from L2.
// The second consumer stays a little behind the first: one stores its results while the other multiplies.
//
//   full_barriers[stage]       end when the stage's bytes have been copied                 producer -> consumers
//   empty_barriers[stage]      end when all consumer warps have read it                    consumers -> producer
//   item_full_barriers[slot]   end when the item has been posted                           producer -> consumers
//   item_empty_barriers[slot]  end when all consumer warps have released it                consumers -> producer
//   order_barriers[slot]       end when the first consumer has begun enough of the item    first -> second consumer
//
// A wait for a parity is right only while at most one phase is missing. So both consumers wait for every stage of every
// item, and there is an order barrier for each slot: nobody can get two rounds ahead of somebody who has not released
// his stage or item.
#pragma once

#include "core/ptx/wgmma_sm90.h"

namespace dynaprune::cuda::sm90 {

constexpr int kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last warpgroup is the producer's
constexpr int kSlots = 4;                                // for items: several short ones may be under way
constexpr int kDepth = 64;                               // summed elements per stage: one row of a swizzled panel
constexpr int kLag = 2;                                  // stages between the consumers
constexpr int kMostStages = 6;
constexpr int kControlBytes = 1024;
constexpr int kLargestShared = 227 * 1024;

// Registers per thread: together no more than the 504 that three warpgroups have.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// sums [OUTER, 2 WIDTH] = left [OUTER, k] right [k, 2 WIDTH], of 16-bit elements T, summed over k in stages of 64.
// OUTER is the width of the weight's blocks on the side that is not summed over; results are written as
// [2 WIDTH][OUTER].
template <class T, int OUTER, int WIDTH, class Item_>
struct Pipeline {
  using Item = Item_;                         // has int stages (negative: no more items)
  using Sums = float[OUTER / 64][WIDTH / 2];  // of one thread: OUTER / 64 products of 64 x WIDTH

  static constexpr int kColumns = kConsumers * WIDTH;
  static constexpr int kLeftBytes = OUTER / 64 * kPanelBytes;
  static constexpr int kStageBytes = kLeftBytes + kColumns / 64 * kPanelBytes;
  static constexpr int kPart = WIDTH < 8192 / OUTER ? WIDTH : 8192 / OUTER;  // columns that a consumer stores at once
  static constexpr int kOutBytes = OUTER * kPart * int(sizeof(T));
  static constexpr int kFitting = (kLargestShared - kControlBytes - kConsumers * kOutBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static constexpr int kSharedBytes = kStages * kStageBytes + kConsumers * kOutBytes + kControlBytes;
  static_assert(sizeof(T) == 2 && OUTER % 64 == 0 && WIDTH % kPart == 0 && kStages > kLag);

  struct Control {
    uint64_t full_barriers[kStages], empty_barriers[kStages];
    uint64_t item_full_barriers[kSlots], item_empty_barriers[kSlots], order_barriers[kSlots];
    Item items[kSlots];
    float warp_sums[kConsumerWarps][WIDTH / 64];
  };
  static_assert(sizeof(Control) <= kControlBytes);

  static DYN_DEVICE unsigned char* left(int stage) { return shared_memory() + stage * kStageBytes; }
  static DYN_DEVICE unsigned char* right(int stage) { return left(stage) + kLeftBytes; }
  static DYN_DEVICE unsigned char* out(int consumer) {
    return shared_memory() + kStages * kStageBytes + consumer * kOutBytes;
  }
  static DYN_DEVICE Control& control() { return *reinterpret_cast<Control*>(out(kConsumers)); }

  // All threads of the block, first of all.
  static DYN_DEVICE void init_barriers() {
    if (thread() == 0) {
      Control& c = control();
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(&c.full_barriers[stage], 1);
        mbarrier_init(&c.empty_barriers[stage], kConsumerWarps);
      }
      for (int slot = 0; slot < kSlots; ++slot) {
        mbarrier_init(&c.item_full_barriers[slot], 1);
        mbarrier_init(&c.item_empty_barriers[slot], kConsumerWarps);
        mbarrier_init(&c.order_barriers[slot], kWarpgroup / kWarp);
      }
      mbarrier_init_fence();
    }
    sync_block();
  }

  static DYN_DEVICE bool is_producer() { return thread() >= kConsumers * kWarpgroup; }

  // One thread.
  class Producer {
   public:
    // Hands the item to the consumers; the stages that follow are the item's. It stays where it is until they are done.
    DYN_DEVICE const Item& post(const Item& item) {
      const int slot = int(items_ % kSlots);
      Control& c = control();
      mbarrier_wait(&c.item_empty_barriers[slot], (items_ / kSlots & 1) ^ 1);
      ++items_;
      c.items[slot] = item;
      mbarrier_arrive(&c.item_full_barriers[slot]);
      return c.items[slot];
    }
    DYN_DEVICE void finish() {
      Item last{};
      last.stages = -1;
      post(last);
    }

    // The next stage, empty; `bytes` will be copied into it, on its full barrier.
    DYN_DEVICE int acquire(int bytes) {
      const int stage = int(position_ % kStages);
      mbarrier_wait(&control().empty_barriers[stage], (position_ / kStages & 1) ^ 1);
      ++position_;
      mbarrier_arrive_expect_tx(full_barrier(stage), bytes);
      return stage;
    }
    DYN_DEVICE uint64_t* full_barrier(int stage) const { return &control().full_barriers[stage]; }

   private:
    uint32_t position_ = 0, items_ = 0;
  };

  // A warpgroup; every thread of it makes every call.
  class Consumer {
   public:
    DYN_DEVICE int index() const { return thread() / kWarpgroup; }
    DYN_DEVICE int first_column() const { return index() * WIDTH; }  // of the item's

    DYN_DEVICE const Item& wait_item() const {
      mbarrier_wait(&control().item_full_barriers[slot()], parity());
      return control().items[slot()];
    }
    DYN_DEVICE void release_item() {
      sync_warp();
      if (lane() == 0) mbarrier_arrive(&control().item_empty_barriers[slot()]);
      ++items_;
    }

    // sums = the products over the item's stages, once per item. A consumer that has no columns only keeps up.
    template <Major LEFT, Major RIGHT>
    DYN_DEVICE void multiply(Sums& sums, int stages, bool has_columns) {
      // The same in all lanes, which the compiler cannot know of what lay in shared memory: descriptors are then made
      // in uniform registers, where wgmma wants them.
      stages = shuffle(stages, 0);
      const uint64_t left = descriptor(shared_address(Pipeline::left(0)), LEFT);
      const uint64_t right = descriptor(shared_address(Pipeline::right(0)) + first_column() * kSwizzleRow, RIGHT);
      DYN_UNROLL
      for (int m = 0; m < OUTER / 64; ++m)
        DYN_UNROLL
        for (int i = 0; i < WIDTH / 2; ++i) sums[m][i] = 0.0f;
      if (index() == 1) mbarrier_wait(&control().order_barriers[slot()], parity());
      if (!has_columns) {
        for (int step = 0; step < stages; ++step, ++position_) {
          mbarrier_wait(&control().full_barriers[position_ % kStages], position_ / kStages & 1);
          sync_warp();  // no lane may be left waiting for this phase when the stage is filled again
          release(position_);
        }
        return;
      }
      for (int step = 0; step < stages; ++step, ++position_) {
        const int stage = int(position_ % kStages);
        mbarrier_wait(&control().full_barriers[stage], position_ / kStages & 1);
        warpgroup_fence_operand(sums);
        wgmma_fence();
        const uint64_t at = uint64_t(stage) * (kStageBytes >> 4);
        DYN_UNROLL
        for (int k = 0; k < kDepth / 16; ++k)
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m)
            wgmma<T, WIDTH, LEFT, RIGHT>(sums[m], left + at + k * next_sum16(LEFT) + m * kNextM64,
                                         right + at + k * next_sum16(RIGHT));
        wgmma_commit();
        wgmma_wait<1>();  // the products of the stage before are done
        warpgroup_fence_operand(sums);
        if (step > 0) release(position_ - 1);
        if (step + 1 == kLag) arrive_order();
      }
      if (stages < kLag) arrive_order();
      wgmma_wait<0>();
      warpgroup_fence_operand(sums);
      if (stages > 0) release(position_ - 1);
    }

    // Rounds the sums and passes them on: store(column, first, eight) gets sums first .. first + 7 of each of the
    // consumer's columns, in an order that makes neighbouring threads' stores adjacent.
    template <class Store>
    DYN_DEVICE void store_columns(const Sums& sums, const Store& store) const {
      constexpr int kPieces = OUTER / 8;  // 16-byte pieces per row of the part [kPart][OUTER] in shared memory
      const auto place = [](int column, int piece) {  // swizzled, so that neither side has bank conflicts
        return (column * kPieces + (piece ^ (column & 7))) * 16;
      };
      unsigned char* part = out(index());
      const int piece = warp() % 4 * 2 + lane() / 8 % 2, column = lane() / 16 * 8 + lane() % 8;
      DYN_UNROLL
      for (int first = 0; first < WIDTH; first += kPart) {
        sync_warpgroup();  // the part before has been read
        DYN_UNROLL
        for (int m = 0; m < OUTER / 64; ++m)
          DYN_UNROLL
          for (int j = 0; j < kPart / 8; j += 2) {
            const float* d = &sums[m][first / 2 + 4 * j];  // 16 columns: two 8 x 8 matrices below each other, twice
            stmatrix_x4_transposed(part + place(8 * j + column, m * 8 + piece), pack<T>(d[0], d[1]),
                                      pack<T>(d[2], d[3]), pack<T>(d[4], d[5]), pack<T>(d[6], d[7]));
          }
        sync_warpgroup();
        DYN_UNROLL
        for (int i = 0; i < kPart * kPieces / kWarpgroup; ++i) {
          const int at = i * kWarpgroup + thread() % kWarpgroup;
          store(first + at / kPieces, at % kPieces * 8,
                load16(reinterpret_cast<const T*>(part + place(at / kPieces, at % kPieces))));
        }
      }
    }

    // Row (of OUTER) and column (of this consumer's WIDTH) of sums[m][i] in this thread.
    static DYN_DEVICE int row_of(int m, int i) { return m * 64 + warp() % 4 * 16 + lane() / 4 + i / 2 % 2 * 8; }
    static DYN_DEVICE int column_of(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }

    DYN_DEVICE void sync_warpgroup() const { named_barrier_sync(1 + index(), kWarpgroup); }

   private:
    DYN_DEVICE int slot() const { return int(items_ % kSlots); }
    DYN_DEVICE uint32_t parity() const { return items_ / kSlots & 1; }

    static DYN_DEVICE void warpgroup_fence_operand(Sums& sums) {
      DYN_UNROLL
      for (int m = 0; m < OUTER / 64; ++m) sm90::warpgroup_fence_operand(sums[m]);
    }
    // Each warp speaks for itself: its products have read the stage.
    static DYN_DEVICE void release(uint32_t position) {
      if (lane() == 0) mbarrier_arrive(&control().empty_barriers[position % kStages]);
    }
    DYN_DEVICE void arrive_order() const {
      if (index() == 0 && lane() == 0) mbarrier_arrive(&control().order_barriers[slot()]);
    }

    uint32_t position_ = 0, items_ = 0;
  };
};

}  // namespace dynaprune::cuda::sm90
